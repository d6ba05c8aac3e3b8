"""Make the pictures of the README from the app itself: ``python docs/picture.py``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dtp_tui.app import prepare_terminal

if TYPE_CHECKING:
    from dtp_tui.dashboard import DtpApp

HERE = Path(__file__).parent
SIZE = (120, 34)


async def picture(name: str, job: str | None, *keys: str) -> None:
    """Press keys in the demo, wait until its charts are drawn, write ``docs/<name>.svg``."""
    from dtp_tui.demo import Demo  # noqa: PLC0415

    from dtp_tui.dashboard import DtpApp, Source  # noqa: PLC0415 - after the terminal is prepared

    demo = Demo()
    app = DtpApp(Source("demo", demo.open, demo.clock.now), job=job)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause(4)
        await pilot.press(*keys)
        await pilot.pause(2)
        write(app, HERE / f"{name}.svg")


def write(app: DtpApp, path: Path) -> None:
    path.write_text(app.export_screenshot(title="dtp-tui"), encoding="utf-8")


async def main() -> None:
    await picture("dashboard-job", "llama-350m")
    await picture("dashboard-jobs", None)


if __name__ == "__main__":
    os.environ["TZ"] = "UTC"
    prepare_terminal()
    asyncio.run(main())
