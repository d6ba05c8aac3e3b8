"""Durations, sizes and ranges as people write them.

Pure; every error is a `ValueError` of one line.
"""

from __future__ import annotations

import re
from datetime import timedelta

from dtp_engine.jobs import NodeRange

DURATION_PATTERN = r"^\s*(\d+(\.\d+)?\s*(ms|s|m|h|d|w)\s*)+$"
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGTkmgt]i?)?[Bb]?\s*$"
RANGE_PATTERN = r"^\s*\d+\s*\.\.\s*\d+\s*$"
LONGEST = timedelta(days=3650)
LARGEST_BYTES = 2**50
MOST_WORKERS = 4096

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_UNIT_WORDS = {
    "sec": "s",
    "second": "s",
    "min": "m",
    "minute": "m",
    "hr": "h",
    "hour": "h",
    "day": "d",
    "week": "w",
}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_BYTES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")


def parse_duration(text: str) -> timedelta:
    """``10m``, ``1h30m``, ``90s``, ``1.5h``, ``500ms``, ``2 days``.

    >>> parse_duration("1h30m")
    datetime.timedelta(seconds=5400)
    """
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text):
        raise ValueError(f'a duration needs a unit, such as "{text.strip()}s" or "{text.strip()}m"')
    seconds, at = 0.0, 0
    while at < len(text):
        part = _PART.match(text, at)
        unit = part and _unit_of_time(part[2])
        if not part or not unit:
            raise ValueError(f'"{text}" is not a duration; write one as 90s, 10m or 1h30m')
        seconds += float(part[1]) * _SECONDS[unit]
        at = part.end()
    if not text.strip():
        raise ValueError("a duration is missing; write one as 90s, 10m or 1h30m")
    if seconds > LONGEST.total_seconds():
        raise ValueError(f'"{text}" is longer than ten years')
    return timedelta(seconds=seconds)


def _unit_of_time(word: str) -> str | None:
    short = word.lower()
    if short in _SECONDS:
        return short
    return _UNIT_WORDS.get(short.removesuffix("s"))


def parse_size(text: str) -> int:
    """Bytes. ``16GB`` and ``16G`` are powers of ten, ``16GiB`` and ``16Gi`` powers of two.

    >>> parse_size("16GB"), parse_size("512MiB")
    (16000000000, 536870912)
    """
    part = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt])?(i)?([Bb])?\s*", text)
    if not part or (part[3] and not part[2]):
        raise ValueError(f'"{text}" is not a size; write one as 16GB or 512MiB')
    if not part[2] and not part[4]:
        raise ValueError(f'a size needs a unit, such as "{text.strip()}GB"')
    unit = (part[2] or "").lower()
    count = float(part[1]) * (_BINARY_BYTES[unit] if part[3] else _BYTES[unit])
    if count > LARGEST_BYTES:
        raise ValueError(f'"{text}" is more memory than any machine has')
    return round(count)


def parse_whole(text: str, *, least: int, most: int) -> int:
    """A whole number within bounds."""
    if not re.fullmatch(r"[+-]?\d+", text.strip()):
        raise ValueError(f'expected a whole number, found "{text}"')
    if len(text.strip()) > 18:
        raise ValueError(f"must be at most {most}")
    number = int(text)
    if number < least:
        raise ValueError(f"must be at least {least}, found {number}")
    if number > most:
        raise ValueError(f"must be at most {most}, found {number}")
    return number


def parse_number(text: str, *, above: float, most: float) -> float:
    """A number such as 2, 0.5 or 1e-3, within bounds."""
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", text.strip()):
        raise ValueError(f'expected a number, found "{text}"')
    number = float(text)
    if number <= above:
        raise ValueError(f"must be more than {above:g}, found {number:g}")
    if number > most:
        raise ValueError(f"must be at most {most:g}, found {number:g}")
    return number


def parse_nodes(text: str) -> NodeRange:
    """``2`` is exactly two workers, ``1..4`` from one to four.

    >>> parse_nodes("1..4")
    NodeRange(min=1, max=4)
    """
    low, dots, high = text.partition("..")
    try:
        fewest = parse_whole(low, least=1, most=MOST_WORKERS)
        most = parse_whole(high, least=1, most=MOST_WORKERS) if dots else fewest
    except ValueError as error:
        if str(error).startswith("must"):
            raise
        raise ValueError(
            f'expected a number of workers such as 2, or a range such as 1..4, found "{text}"'
        ) from None
    if fewest > most:
        raise ValueError(f"the range {text} is reversed; write {most}..{fewest}")
    return NodeRange(fewest, most)


def write_duration(value: timedelta) -> str:
    """As a job file writes it, exact to the millisecond; `parse_duration` reads it back.

    >>> write_duration(timedelta(seconds=90))
    '1m30s'
    """
    milliseconds = round(value.total_seconds() * 1000)
    parts: list[str] = []
    for size, unit in ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s"), (1, "ms")):
        amount, milliseconds = divmod(milliseconds, size)
        if amount:
            parts.append(f"{amount}{unit}")
    return "".join(parts) or "0s"


def write_size(count: int) -> str:
    """The shortest exact way to write it in a job file; `parse_size` reads it back.

    >>> write_size(16_000_000_000), write_size(2**29)
    ('16GB', '512MiB')
    """
    sizes = {f"{unit.upper()}B": size for unit, size in _BYTES.items()}
    sizes |= {f"{unit.upper()}iB": size for unit, size in _BINARY_BYTES.items()}
    exact = [f"{count // size}{unit}" for unit, size in sizes.items() if count % size == 0]
    return min(exact, key=len)
