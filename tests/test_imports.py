"""What importing each door may not load; the static contracts cannot see whether a deferral
defers."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "textual", "boto3", "botocore", "wandb", "moto"}
FACES = {"rich", "typer", "click"}

DOORS = {
    "dtp_trainer.wire": HEAVY | FACES | {"numpy", "yaml", "msgspec", "psutil", "asyncio"},
    "dtp_trainer.storage": HEAVY | FACES | {"numpy", "yaml", "msgspec", "asyncio"},
    "dtp_trainer.agent": HEAVY | FACES | {"numpy", "msgspec", "yaml"},
    "dtp_engine.engine": HEAVY | FACES | {"numpy"},
    "dtp_engine.controller": HEAVY | FACES | {"numpy"},
    "dtp_tui.cli": HEAVY | {"numpy", "asyncio", "dtp_engine.engine", "sqlite3"},
    "dtp_tui.app": HEAVY - {"textual"} | {"typer", "numpy"},
}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_loads_nothing_heavy(door: str) -> None:
    """Importing a door leaves the libraries that it defers out of the process."""
    code = f"import json, sys, {door}; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True
    )
    assert set(json.loads(found.stdout)) & DOORS[door] == set()
