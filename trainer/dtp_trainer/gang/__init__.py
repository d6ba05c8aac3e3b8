"""How the workers of an attempt agree: election, members, generations, and who is blamed."""
