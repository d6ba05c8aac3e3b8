"""What an agent does for its own worker: set-up, ranks, their lines and steps, host use."""
