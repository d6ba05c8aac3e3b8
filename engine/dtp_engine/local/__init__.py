"""This machine as a cluster: SQLite ledger, worker processes, log files."""
