"""One GPU: blocks of a plain loop and of `Session`, interleaved in one process; a GPT in bf16.

Both have the same model, batch and fused AdamW. Arguments: the file for the result, and ``tiny`` to
try the script where there is no GPU."""

import copy
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtp_trainer.options import NonFinite, Options, Precision
from dtp_trainer.session import Session
from dtp_trainer.session.efficiency import peak_tflops
from dtp_trainer.tasks.gpt import Gpt, Size
from dtp_trainer.worker.gpus import open_gpus

TINY = "tiny" in sys.argv
SIZE = Size(2, 64, 2, 64) if TINY else Size(layers=12, width=768, heads=12, context=1024)
BATCH, BLOCK, BLOCKS, WARM_BLOCKS = (4, 4, 4, 1) if TINY else (32, 10, 12, 3)
CUDA = torch.cuda.is_available()


class Bytes:
    """Random text; what it says does not matter to its speed."""

    def __init__(self) -> None:
        self.text = torch.randint(0, 256, (1 << 24,), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.text) // SIZE.context - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        starts = torch.as_tensor(indices).unsqueeze(1) * SIZE.context
        return self.text[starts + torch.arange(SIZE.context + 1)].long()


class Busy:
    """How busy NVML says the GPU is, some times a second while `watching`."""

    def __init__(self) -> None:
        self.watching = ""
        self.percent: dict[str, list[float]] = {"plain": [], "session": []}
        if CUDA:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        nvml, gpus = open_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        while True:
            name = self.watching
            time.sleep(0.2)
            percent = float(nvml.nvmlDeviceGetUtilizationRates(gpus[0]).gpu)
            if name and name == self.watching:
                self.percent[name].append(percent)


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    logits = model(text[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, text[:, 1:].flatten())


def plain() -> Iterator[None]:
    device = torch.device("cuda" if CUDA else "cpu")
    net = copy.deepcopy(NET).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=CUDA)
    while True:
        text = DATA.__getitems__(torch.randint(0, len(DATA), (BATCH,)).tolist())
        if CUDA:
            text = text.pin_memory().to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(net, text)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def with_session() -> Iterator[None]:
    net = copy.deepcopy(NET)
    # The optimizer is made before the model moves, as scripts do; fused is dtp's own choice then.
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    options = Options(
        precision=Precision.BF16, non_finite=NonFinite.SKIP, fused_optimizer=CUDA, prefetch=2
    )
    session = Session(model=net, optimizer=optimizer, options=options)
    model = session.ddp(net)
    session.flops(per_token=PER_TOKEN)
    tokens = BATCH * SIZE.context
    for text in session.batches(DATA, global_batch=BATCH, epochs=1000, collate=lambda x: x):
        loss = session.optimize(lambda part: loss_of(model, part), text)
        session.step(loss=loss, tokens=tokens)
        yield


torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
NET, DATA = Gpt(SIZE), Bytes()
WEIGHTS = sum(p.numel() for p in NET.parameters())
PER_TOKEN = 6 * WEIGHTS + 12 * SIZE.layers * SIZE.width * SIZE.context
"""With attention, as in PaLM's appendix B (Chowdhery and others, 2022)."""

busy = Busy()
steps = {"plain": plain(), "session": with_session()}
seconds: dict[str, list[float]] = {name: [] for name in steps}
for block in range(WARM_BLOCKS + BLOCKS):
    for name in steps if block % 2 else reversed(steps):
        busy.watching = name if block >= WARM_BLOCKS else ""
        started = time.perf_counter()
        for _ in range(BLOCK):
            next(steps[name])
        if CUDA:
            torch.cuda.synchronize()
        busy.watching = ""
        if block >= WARM_BLOCKS:
            seconds[name].append((time.perf_counter() - started) / BLOCK)

device_name = torch.cuda.get_device_name() if CUDA else "CPU"
result = {
    "device": device_name,
    "model": {**dataclasses.asdict(SIZE), "parameters": WEIGHTS},
    "tokens_a_step": BATCH * SIZE.context,
    "flops_a_token": PER_TOKEN,
    "peak_tflops": peak_tflops(device_name, Precision.BF16, tf32=True),
    "step_s": seconds,
    "busy_percent": busy.percent,
}
Path(sys.argv[1]).write_text(json.dumps(result))
os._exit(0)
