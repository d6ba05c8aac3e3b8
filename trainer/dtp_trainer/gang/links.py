"""A connection between two agents of a gang, authenticated both ways; then one message a line.

Each side proves that it knows the attempt's secret by an HMAC over both sides' nonces, its role
(so that no answer can be reflected) and the address (so that none can be relayed elsewhere).
Then every line carries an HMAC over its number and itself, with a key of this connection and
direction: whoever sits in between can cut the connection, and say nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from dtp_trainer.gang.messages import Malformed, Message, decode, encode
from dtp_trainer.wire import Launch
from dtp_trainer.worker import steady

HANDSHAKE_S = 5.0
CONNECT_S = 3.0
LONGEST_LINE = 1 << 20

log = logging.getLogger("dtp.gang")


class Unreachable(Exception):
    """Nobody answers there in time; the leader may live."""


class Vacated(Unreachable):
    """Nobody listens there: the leader is gone."""


class Refused(Exception):
    """The leader answered and does not accept this worker."""


class Impostor(Exception):
    """Whoever is there does not know the secret."""


def scope_of(launch: Launch) -> str:
    """Names the job and the attempt in a proof."""
    return f"{launch.job_id}.a{launch.attempt}"


class _Seal:
    """Of the lines of one direction; each is sealed or checked once, in order."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._number = 0

    def over(self, line: bytes) -> bytes:
        numbered = self._number.to_bytes(8, "big") + line
        self._number += 1
        return hmac.digest(self._key, numbered, "sha256").hex().encode()


@dataclass(frozen=True, slots=True)
class _Seals:
    ours: _Seal
    theirs: _Seal


class Link:
    """One side of an authenticated connection; `send` never waits."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seals: _Seals
    ) -> None:
        self._reader, self._writer = reader, writer
        self._seals = seals
        self.heard_at = steady.now()

    def send(self, message: Message) -> None:
        """Nothing happens when the other side is gone: `receive` tells."""
        if not self._writer.is_closing():
            line = encode(message)
            self._writer.write(self._seals.ours.over(line) + b" " + line)

    async def receive(self) -> Message | None:
        """None when the connection ended, for whatever reason, or is not ours alone any more."""
        try:
            sealed = await self._reader.readline()
            seal, _, line = sealed.partition(b" ")
            if not line.endswith(b"\n"):
                return None
            if not hmac.compare_digest(seal, self._seals.theirs.over(line)):
                log.warning("a line of somebody else's was in a connection of the gang: it is cut")
                return None
            message = decode(line)
        except (OSError, ValueError, Malformed):
            return None
        self.heard_at = steady.now()
        return message

    def close(self) -> None:
        """What was sent still arrives."""
        self._writer.close()

    def abort(self) -> None:
        """At once, whatever is still unsent."""
        self._writer.transport.abort()


async def connect(address: str, *, secret: str, scope: str) -> Link:
    """A link to the leader at `address` (``host:port``). `scope` names the job and the attempt.

    Raises:
        Unreachable, Vacated, Refused, Impostor
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, int(port), limit=LONGEST_LINE)
    except ConnectionRefusedError as error:
        raise Vacated(f"nobody listens at {address}") from error
    except (OSError, ValueError) as error:
        raise Unreachable(f"cannot reach {address}: {error or 'no answer'}") from error
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            seals = await _introduce(reader, writer, secret, f"{scope} {address}")
    except (OSError, ValueError) as error:
        writer.transport.abort()
        raise Unreachable(f"{address} does not answer as a leader does: {error}") from error
    except BaseException:
        writer.transport.abort()
        raise
    return Link(reader, writer, seals)


async def accept(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    address: str,
    secret: str,
    scope: str,
) -> Link:
    """The leader's side; the connection is closed when an error is raised.

    Raises:
        Impostor: the other side does not know the secret, or says nothing we understand.
    """
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            seals = await _challenge(reader, writer, secret, f"{scope} {address}")
    except (OSError, ValueError) as error:
        writer.transport.abort()
        raise Impostor(f"a connection that is not one of ours: {error}") from error
    except BaseException:
        writer.close()
        raise
    return Link(reader, writer, seals)


async def _introduce(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, scope: str
) -> _Seals:
    theirs = (await _read(reader))["nonce"]
    ours = secrets.token_hex(16)
    _write(writer, {"nonce": ours, "proof": _proof(secret, "member", scope, theirs, ours)})
    answer = await _read(reader)
    if "refused" in answer:
        raise Refused(answer["refused"])
    if not _matches(answer.get("proof"), _proof(secret, "leader", scope, theirs, ours)):
        raise Impostor("whoever answers at the leader's address does not know the secret")
    leaders, members = _seals(secret, scope, theirs, ours)
    return _Seals(ours=members, theirs=leaders)


async def _challenge(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, scope: str
) -> _Seals:
    ours = secrets.token_hex(16)
    _write(writer, {"nonce": ours})
    answer = await _read(reader)
    theirs = answer.get("nonce", "")
    if not _matches(answer.get("proof"), _proof(secret, "member", scope, ours, theirs)):
        _write(writer, {"refused": "wrong secret"})
        raise Impostor("a worker with another secret was refused")
    _write(writer, {"proof": _proof(secret, "leader", scope, ours, theirs)})
    leaders, members = _seals(secret, scope, ours, theirs)
    return _Seals(ours=leaders, theirs=members)


def _seals(secret: str, scope: str, leaders: str, members: str) -> tuple[_Seal, _Seal]:
    """Of the leader's lines and of the member's; the nonces make the keys those of this connection
    alone."""
    keys = (
        _proof(secret, f"lines of the {role}", scope, leaders, members)
        for role in ("leader", "member")
    )
    first, second = keys
    return _Seal(first), _Seal(second)


def _proof(secret: str, role: str, scope: str, leaders: str, members: str) -> str:
    text = "\n".join(("dtp gang", role, scope, leaders, members))
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def _matches(given: str | None, wanted: str) -> bool:
    return hmac.compare_digest((given or "").encode(), wanted.encode())


async def _read(reader: asyncio.StreamReader) -> Mapping[str, str]:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise ValueError("the connection ended")
    data = json.loads(line)
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise ValueError("an answer of another kind")
    return data


def _write(writer: asyncio.StreamWriter, data: Mapping[str, str]) -> None:
    writer.write(json.dumps(data).encode() + b"\n")
