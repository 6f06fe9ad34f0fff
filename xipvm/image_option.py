"""Which image a guest is executed out of, and which of its files are guest memory, as the command line says it."""

from __future__ import annotations

import os
from typing import NamedTuple

from xipvm.address import PAGE_SIZE
from xipvm.errors import BadInput
from xipvm.file_option import split_option
from xipvm.loader.elf import ElfImage


class ImageChoice(NamedTuple):
    """An image, as the command line names it: ``FILE[,snapshot=on][,readonly=on]``."""

    path: str
    snapshot: bool = False
    readonly: bool = False


class FileMapping(NamedTuple):
    """A file of the image as guest memory, as the command line says it: ``PATH@ADDRESS[,shared=on]``."""

    path: str
    address: int
    shared: bool = False


def parse_image(text: str) -> ImageChoice:
    """What ``FILE[,snapshot=on|off][,readonly=on|off]`` says. Raises BadInput."""
    path, switches = _settings(text, {"snapshot": False, "readonly": False}, "an image")
    return ImageChoice(path, **switches)


def parse_mapping(text: str) -> FileMapping:
    """What ``PATH@ADDRESS[,shared=on|off]`` says. Raises BadInput."""
    what, switches = _settings(text, {"shared": False}, "a mapping")
    path, at, place = what.rpartition("@")
    try:
        address = int(place, 0)
    except ValueError:
        address = -1
    if not at or not path or address < 0 or address % PAGE_SIZE:
        raise BadInput(f"{text!r}: write PATH@ADDRESS[,shared=on] with an address of whole pages, such as 0x60000000")
    return FileMapping(path, address, **switches)


def _settings(text: str, switches: dict[str, bool], what: str) -> tuple[str, dict[str, bool]]:
    path, settings = split_option(text)
    if not path:
        raise BadInput(f"{text!r} names no file")
    for setting, key, value in settings:
        if key not in switches or value not in ("on", "off"):
            known = ", ".join(f"{name}=on|off" for name in switches)
            raise BadInput(f"{setting!r} is no setting of {what}; there are {known}")
        switches[key] = value == "on"
    return path, switches


def open_elf(guest: str | os.PathLike[str], choice: ImageChoice | None) -> ElfImage:
    """The guest: a file, or a file of an image. Raises GuestImageError and XipImageError."""
    if choice is None:
        return ElfImage.open(guest)
    from xipvm.image_memory import open_guest

    return open_guest(choice, os.fspath(guest))
