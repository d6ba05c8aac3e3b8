"""The engine: jobs, money and capacity; the same one behind the command line and the dashboard."""
