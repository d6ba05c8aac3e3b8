"""Starting ranks: forked from a warm process where that is possible, executed afresh otherwise."""
