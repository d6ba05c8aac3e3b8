"""The API for a script of one's own: five lines for checkpoints, pause, resume, scale, metrics.

`docs/session.md` tells it to people.
"""

from dtp_trainer.session.session import Session

__all__ = ["Session"]
