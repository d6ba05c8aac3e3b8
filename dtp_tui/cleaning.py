"""Text of others, made fit to be shown; pure."""

from __future__ import annotations

import re

LINE_CAP = 8_192
"""Characters kept of one line."""

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # OSC, DCS …: titles, clipboard, links
    r"|\x1b[ -/]*[0-~]?"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)
_UNSAFE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufe00-\ufe0f\ufeff\ufff9-\ufffb]"
)


def harmless(text: str) -> str:
    """A line that cannot move the cursor, colour the screen, hide text or fill the memory.

    >>> harmless("10%\\r\\x1b[32m100%\\x1b[0m\\tdone")
    '100%    done'
    """
    note = ""
    if len(text) > LINE_CAP:
        note = f" … {len(text) - LINE_CAP:,} more characters"
        text = text[:LINE_CAP]
    if text.isascii() and text.isprintable():
        return text + note
    text = _ESCAPES.sub("", text).rstrip("\r\n")
    text = text[text.rfind("\r") + 1 :]
    return _UNSAFE.sub("·", text.expandtabs(8)) + note
