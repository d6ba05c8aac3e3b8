"""Rank 1 stops for good after a few steps."""

import time

import torch

from dtp_trainer.session import Session

net = torch.nn.Linear(4, 4)
session = Session(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
model = session.ddp(net)
while True:
    loss = model(torch.randn(2, 4)).square().mean()
    loss.backward()
    if session.rank == 1 and session.global_step == 5:
        time.sleep(3600)
    session.step(loss=loss)
