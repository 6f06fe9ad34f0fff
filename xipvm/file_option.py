"""``FILE[,KEY=VALUE]...``: how the command line names a file and says what to do with it, as QEMU's does.

A comma in a file name is doubled. Which keys there are, and what their values mean, is for whoever has the option.
"""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """One setting of a file; ``text`` is all of it, as it was written."""

    text: str
    key: str
    value: str


def split_option(text: str) -> tuple[str, list[Setting]]:
    """The file that an option names, ``""`` for none, and its settings in order."""
    # A NUL cannot be part of a file name, so it can stand for a doubled comma meanwhile.
    path, *settings = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    return path, [Setting(text, text.partition("=")[0], text.partition("=")[2]) for text in settings]
