"""What fits, and what never will."""

from datetime import UTC, datetime

import pytest

from dtp_engine.backend import Capacity, Machine
from dtp_engine.errors import UsageError
from dtp_engine.jobs import JobSpec, NodeRange, Resources
from dtp_engine.room import check_fits_ever

LARGEST = Resources(gpus=0, cpus=2.0, memory_bytes=8_000_000_000)


def capacity(*, can_grow: bool = False) -> Capacity:
    machine = Machine("here", 2.0, 8_000_000_000, 0)
    return Capacity(
        datetime(2026, 1, 1, tzinfo=UTC), (machine,), 0.0, 0, 0, LARGEST, can_grow=can_grow
    )


def spec(nodes: NodeRange, **resources: float) -> JobSpec:
    return JobSpec(name="big", run="true", nodes=nodes, resources=Resources(**resources))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "resources", "words"),
    [
        (NodeRange(1, 1), {"cpus": 3.0}, "a worker asks for 3 CPU, the largest machine has 2 CPU"),
        (NodeRange(1, 1), {"gpus": 1, "cpus": 1.0}, "a worker asks for 1 GPU \\+ 1 CPU"),
        (NodeRange(3, 4), {"cpus": 1.0}, "needs at least 3 workers, all machines here hold 2"),
    ],
)
def test_a_job_that_never_fits_is_refused(
    nodes: NodeRange, resources: dict[str, float], words: str
) -> None:
    """One line says what it asks for and what there is."""
    with pytest.raises(UsageError, match=words):
        check_fits_ever(spec(nodes, **resources), capacity())


def test_a_job_that_waits_is_not_refused() -> None:
    """Room that is taken now, or that may come, is waited for."""
    check_fits_ever(spec(NodeRange(1, 4), cpus=1.0), capacity())
    check_fits_ever(spec(NodeRange(3, 4), cpus=1.0), capacity(can_grow=True))
