"""The built-in tasks, small and real."""
