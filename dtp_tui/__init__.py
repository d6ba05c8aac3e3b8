"""The two faces of dtp: the `dtp` command line and the `dtp-tui` dashboard."""

__version__ = "0.1.0"
