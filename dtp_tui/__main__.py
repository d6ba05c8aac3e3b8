"""`python -m dtp_tui` is `dtp`."""

from __future__ import annotations

from dtp_tui.cli import main

if __name__ == "__main__":
    main()
