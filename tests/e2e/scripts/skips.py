"""In its first generation rank 1 leaves out a collective in its sixth step, so both ranks wait."""

import os
import time

import torch
import torch.distributed as dist

from dtp_trainer.session import Session

net = torch.nn.Linear(4, 4)
session = Session(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
model = session.ddp(net)
apart = dist.new_group(backend="gloo")
deaf = session.rank == 1 and os.environ["DTP_GENERATION"] == "1"
while session.global_step < int(os.environ["STEPS"]):
    loss = model(torch.randn(2, 4)).square().mean()
    if not (deaf and session.global_step == 5):
        dist.all_reduce(loss.detach().clone(), group=apart)
    loss.backward()
    time.sleep(float(os.environ.get("PACE", "0")))
    session.step(loss=loss)
session.finish()
