"""300 steps of 50 ms with a state of about 3 MB."""

import time

import torch

from dtp_trainer.session import Session

net = torch.nn.Linear(512, 512)
optimizer = torch.optim.Adam(net.parameters())
session = Session(model=net, optimizer=optimizer)
for _ in range(session.global_step, 300):
    loss = net(torch.randn(8, 512)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0.05)
    session.step(loss=loss)
session.finish()
