"""The second rank wants more memory in step 4 than any machine has."""

import torch

from dtp_trainer.session import Session

torch.manual_seed(0)
net = torch.nn.Linear(1, 1)
session = Session(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
model = session.ddp(net)


def loss_of(batch: torch.Tensor) -> torch.Tensor:
    if session.rank == 1 and session.global_step == 3:
        torch.empty(1 << 60, dtype=torch.uint8)
    return model(batch).mean()


for batch in session.batches(torch.randn(64, 1), global_batch=8, epochs=2):
    session.step(loss=session.optimize(loss_of, batch))
session.finish()
