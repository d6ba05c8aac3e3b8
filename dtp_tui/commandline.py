"""What can be typed after ``:``, and what it means; pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dtp_tui.messages import Verb

TABS = ("overview", "logs", "workers", "checkpoints", "events", "config")


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    argument: str
    """What it takes, for the help; empty for nothing."""
    help: str
    aliases: tuple[str, ...] = ()


COMMANDS = (
    Command("jobs", "", "all jobs", ("j",)),
    Command("job", "NAME", "its charts", ("open",)),
    *(Command(tab, "[NAME]", f"its {tab}") for tab in TABS[1:]),
    Command("pause", "[NAME]", "checkpoint, free machines"),
    Command("resume", "[NAME]", "from a checkpoint on"),
    Command("scale", "[NAME]", "its workers"),
    Command("stop", "[NAME]", "checkpoint, and end it"),
    Command("help", "", "keys and commands", ("h", "?")),
    Command("quit", "", "leave; jobs go on", ("q", "exit")),
)
_BY_WORD = {word: command for command in COMMANDS for word in (command.name, *command.aliases)}


class BadCommand(Exception):
    """The message is one line that says what can be typed instead."""


@dataclass(frozen=True, slots=True)
class Order:
    """A typed line, understood."""

    command: str
    job: str
    """Name or id; empty: the one that is selected or open."""


def parse(text: str) -> Order:
    """Raises `BadCommand`."""
    words = text.split()
    if not words:
        raise BadCommand("type a command, such as :jobs or :help")
    command = _BY_WORD.get(words[0].lower())
    if command is None:
        near = difflib.get_close_matches(words[0].lower(), _BY_WORD, n=1)
        hint = f"; did you mean :{near[0]}?" if near else "; :help lists what there is"
        raise BadCommand(f"no command :{words[0]}{hint}")
    if len(words) > (2 if command.argument else 1):
        usage = f":{command.name} {command.argument}".rstrip()
        raise BadCommand(f"too many words; it is {usage}")
    job = words[1] if len(words) > 1 else ""
    if command.argument == "NAME" and not job:
        raise BadCommand(f"which job? :{command.name} NAME")
    return Order(command.name, job)


def suggestions(job_names: Sequence[str]) -> list[str]:
    """Whole lines that may be completed to, shortest first."""
    return list(_lines(dict.fromkeys(job_names)))


def _lines(names: dict[str, None]) -> Iterator[str]:
    yield from (command.name for command in COMMANDS)
    for command in COMMANDS:
        if command.argument:
            yield from (f"{command.name} {name}" for name in names)


def verb_of(order: Order) -> Verb | None:
    return Verb(order.command) if order.command in set(Verb) else None
