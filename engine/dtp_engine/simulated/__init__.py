"""A deterministic cluster on virtual time: tests, `dtp-tui --demo`."""
