"""A rank records steps when asked, and never lets that touch its training."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dtp_trainer.inspection import Ask, Profiled, answer_key
from dtp_trainer.session.profiling import Profiling
from dtp_trainer.storage import open_storage
from dtp_trainer.wire import Env


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rank 3 with a storage, and a way to leave it a wish."""
    monkeypatch.setenv(Env.ASK_FILE, str(tmp_path / "ask.json"))
    monkeypatch.setenv(Env.STORAGE, tmp_path.as_uri())

    def ask(**fields: Any) -> Profiling:
        wish = Ask(id="w1", by="ana", until=0.0, **{"steps": 2, **fields})
        (tmp_path / "ask.json").write_text(json.dumps(wish.to_dict()))
        return Profiling(rank=3)

    return ask


def answer() -> Profiled:
    storage = open_storage(os.environ[Env.STORAGE])
    found: Profiled = Profiled.from_dict(json.loads(storage.read(answer_key("w1", 3))))
    return found


def train(rank: Profiling, steps: range, *, device: str = "cpu") -> None:
    net = torch.nn.Linear(8, 8, device=device)
    for step in steps:
        net(torch.randn(4, 8, device=device)).sum().backward()
        rank.end_of_step(step)


def recorded(key: str) -> bytes:
    return open_storage(os.environ[Env.STORAGE]).read(key)


def marks(trace: bytes) -> set[str]:
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    return {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep#")}


def test_the_wished_steps_are_recorded(asked: Any) -> None:
    """From the first step that all ranks can make, so many steps, under their numbers."""
    rank = asked(not_before=5)
    train(rank, range(1, 12))
    rank.close()
    told = answer()
    assert (told.first_step, told.last_step, told.error) == (5, 6, "")
    assert told.files == ("profiles/step-000005.rank3.trace.json.gz",)
    assert marks(recorded(told.files[0])) == {"ProfilerStep#5", "ProfilerStep#6"}
    assert {"aten::addmm", "aten::mm"} <= {operator.name for operator in told.operators}


def test_a_rank_that_ends_keeps_what_it_has(asked: Any) -> None:
    """A pause in the middle writes the steps that were taken; before the first, it says so."""
    rank = asked(steps=100)
    train(rank, range(1, 4))
    rank.close()
    assert (answer().first_step, answer().last_step) == (2, 3)
    rank = asked(steps=100)
    train(rank, range(1, 2))
    rank.close()
    assert "before the next step" in answer().error


def test_another_profiler_is_no_failure(asked: Any) -> None:
    """A script that profiles itself trains on, and who asked is told."""
    rank = asked()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
        train(rank, range(1, 6))
    rank.close()
    assert any(event.key == "aten::addmm" for event in own.key_averages())
    assert "own profiler" in answer().error
    assert not answer().files


def test_a_wish_that_is_damaged_is_left_aside(asked: Any, tmp_path: Path) -> None:
    """Training goes on."""
    rank = asked()
    (tmp_path / "ask.json").write_text("{")
    train(rank, range(1, 4))
    rank.close()
    assert not list(tmp_path.glob("profiles/*"))


@pytest.mark.gpu
def test_memory_of_a_gpu(asked: Any) -> None:
    """The history of allocations comes as torch's own snapshot, and kernels are in the trace."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rank = asked(memory=True)
    train(rank, range(1, 6), device="cuda")
    rank.close()
    told = answer()
    assert [key.partition(".rank3.")[2] for key in told.files] == [
        "trace.json.gz",
        "memory.txt",
        "memory.pickle",
    ]
    assert pickle.loads(recorded(told.files[2]))["device_traces"]
    assert told.operators[0].own_bytes > 0
