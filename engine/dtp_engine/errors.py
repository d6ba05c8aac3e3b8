"""Everything the engine raises.

DtpError                    one line for people: what, where, what to do next; carries an exit code
├── UsageError (2)          the caller asked for something that cannot be
│   ├── SpecError           a job file is wrong: file, line, field, nearest right name
│   ├── UnknownJob          no job of that name or id, or several
│   └── Refused             the job is not in a state for that: resume of a running job, scale
beyond the range
├── NoCapacity (4)
└── InfrastructureError (7) the ledger, the disk, a backend, credentials
    ├── LedgerError         locked, read-only, from a newer version
    ├── Damaged             a checkpoint, or the list of them, is not what its writer wrote
    ├── LeaseLost           another controller took over; never shown to people
    └── Unreachable         a backend did not answer; observation is UNKNOWN, never "gone"
"""

from __future__ import annotations


class DtpError(Exception):
    """The message is one line that a person can act upon."""

    exit_code = 1


class UsageError(DtpError):
    exit_code = 2


class SpecError(UsageError):
    """The message begins with ``file:line:``."""


class UnknownJob(UsageError):
    pass


class Refused(UsageError):
    pass


class NoCapacity(DtpError):
    exit_code = 4


class InfrastructureError(DtpError):
    exit_code = 7


class LedgerError(InfrastructureError):
    pass


class LeaseLost(InfrastructureError):
    pass


class Damaged(InfrastructureError):
    """The message begins with the file."""


class Unreachable(InfrastructureError):
    pass
