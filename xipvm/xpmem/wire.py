"""The messages of XPMEM, and how they look on a socket.

A frame is a header of 12 bytes and its payload, all in network byte order::

    2  "XP"      1  version      1  kind      4  tag      4  length of the payload

The payload is the kind's numbers, 8 bytes each, then its data, if it has any. A request carries a tag of the node's
choice, and its answer the same; a RECALL carries one of the owner's, and the DROPPED that answers it the same. Magic
and version stay where they are in every version, so that two ends that do not understand each other can say so.

Whatever comes in from outside goes through a :class:`Decoder`, which takes bytes in any pieces and gives messages until
there is one that is none: then it is broken, and stays so, because what follows means nothing.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from xipvm.address import PAGE_SIZE
from xipvm.errors import XipvmError

VERSION: Final = 1
MAGIC: Final = b"XP"
_HEADER: Final = struct.Struct("!2sBBII")
TEXT_LIMIT: Final = 256
"""Names and reasons are no longer, in bytes."""


class WireError(XipvmError):
    """What came is no message."""


class VersionError(WireError):
    """The other end speaks version ``theirs``."""

    def __init__(self, theirs: int) -> None:
        super().__init__(f"it speaks version {theirs} of the protocol, this is version {VERSION}")
        self.theirs = theirs


class Kind(IntEnum):
    """What a message is. Its numbers are in brackets."""

    # from a node
    HELLO = 1
    """The first message."""
    GET = 2
    """A permit for the segment that the data name [whether to write as well]."""
    ATTACH = 3
    """An attachment to a part of a segment [permit, offset, size in bytes]."""
    FAULT = 4
    """A page of an attachment is needed [attachment, page, whether to write]."""
    LOAD = 5
    """Bytes of a page that was granted [attachment, page, frame, offset, size]."""
    STORE = 6
    """Data for a page that was granted [attachment, page, frame, offset]."""
    DROPPED = 7
    """The pages of a RECALL, whose tag it has, are translated no longer."""
    DETACH = 8
    """An attachment goes; nothing of it is translated any more [attachment]."""
    RELEASE = 9
    """A permit goes, with its attachments [permit]."""
    # from the owner
    WELCOME = 16
    """To HELLO. Data: the names of the segments, a line each."""
    PERMIT = 17
    """To GET [permit, size of the segment, whether it may be written]."""
    ATTACHED = 18
    """To ATTACH [attachment, pages, where in the first page it begins]."""
    GRANT = 19
    """To FAULT: from now on the page is that frame [attachment, page, frame, whether it may be written]."""
    DATA = 20
    """To LOAD."""
    DONE = 21
    """To STORE, DETACH and RELEASE."""
    AGAIN = 22
    """To FAULT, LOAD and STORE: the page is being recalled, or was; fault again."""
    ERROR = 23
    """To any request [errno]. Data: the reason."""
    RECALL = 24
    """Drop the translations of the pages, then say DROPPED [attachment, first page, the one behind the last]."""
    GONE = 25
    """The owner has nothing for this node any more, and says nothing more. Data: the reason."""


class _Layout(NamedTuple):
    numbers: int
    data: int
    """The most bytes of data."""


_LAYOUTS: Final[dict[Kind, _Layout]] = {
    Kind.HELLO: _Layout(0, 0),
    Kind.GET: _Layout(1, TEXT_LIMIT),
    Kind.ATTACH: _Layout(3, 0),
    Kind.FAULT: _Layout(3, 0),
    Kind.LOAD: _Layout(5, 0),
    Kind.STORE: _Layout(4, PAGE_SIZE),
    Kind.DROPPED: _Layout(0, 0),
    Kind.DETACH: _Layout(1, 0),
    Kind.RELEASE: _Layout(1, 0),
    Kind.WELCOME: _Layout(0, 64 * TEXT_LIMIT),
    Kind.PERMIT: _Layout(3, 0),
    Kind.ATTACHED: _Layout(3, 0),
    Kind.GRANT: _Layout(4, 0),
    Kind.DATA: _Layout(0, PAGE_SIZE),
    Kind.DONE: _Layout(0, 0),
    Kind.AGAIN: _Layout(0, 0),
    Kind.ERROR: _Layout(1, TEXT_LIMIT),
    Kind.RECALL: _Layout(3, 0),
    Kind.GONE: _Layout(0, TEXT_LIMIT),
}
FROM_NODE: Final = frozenset(kind for kind in Kind if kind < Kind.WELCOME)
FROM_OWNER: Final = frozenset(Kind) - FROM_NODE


class Message(NamedTuple):
    """One message: ``numbers`` as its kind has them, each of 64 bits without sign."""

    kind: Kind
    tag: int = 0
    numbers: tuple[int, ...] = ()
    data: bytes = b""

    @property
    def text(self) -> str:
        """The data as text for a person: one line, whatever they are."""
        return " ".join("".join(c if c.isprintable() else " " for c in self.data.decode(errors="replace")).split())


def text_data(text: str) -> bytes:
    """``text`` as data, cut where it is too long."""
    return text.encode(errors="replace")[:TEXT_LIMIT]


def encode(message: Message) -> bytes:
    """The frame of ``message``. Raises WireError for one that is not made as its kind is."""
    layout = _LAYOUTS[message.kind]
    if len(message.numbers) != layout.numbers or len(message.data) > layout.data:
        raise WireError(f"{message.kind.name} with {len(message.numbers)} numbers and {len(message.data)} bytes")
    try:
        numbers = struct.pack(f"!{layout.numbers}Q", *message.numbers)
        header = _HEADER.pack(MAGIC, VERSION, message.kind, message.tag, len(numbers) + len(message.data))
    except struct.error as error:
        raise WireError(f"{message.kind.name}: {error}") from None
    return header + numbers + message.data


class Decoder:
    """Makes messages of bytes that come in pieces. ``kinds``: those that this end may be sent."""

    def __init__(self, kinds: frozenset[Kind]) -> None:
        self._kinds = kinds
        self._buffer = bytearray()
        self._broken: WireError | None = None

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete; never more than the longest frame has."""
        return len(self._buffer)

    @property
    def broken(self) -> WireError | None:
        """What was wrong with what came, None for nothing."""
        return self._broken

    def take(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes; those before one that is none, and nothing ever after it."""
        messages: list[Message] = []
        if self._broken is not None:
            return messages
        self._buffer += data
        try:
            while (message := self._next()) is not None:
                messages.append(message)
        except WireError as error:
            self._broken = error
            self._buffer.clear()
        return messages

    def _next(self) -> Message | None:
        buffer = self._buffer
        if buffer[: len(MAGIC)] != MAGIC[: len(buffer)]:
            raise WireError("what it says is no message of XPMEM")
        if len(buffer) > len(MAGIC) and buffer[len(MAGIC)] != VERSION:
            raise VersionError(buffer[len(MAGIC)])
        if len(buffer) < _HEADER.size:
            return None
        _, _, number, tag, length = _HEADER.unpack_from(buffer)
        try:
            kind = Kind(number)
        except ValueError:
            raise WireError(f"it sends message kind {number}, which there is not") from None
        if kind not in self._kinds:
            raise WireError(f"it sends {kind.name}, which is not its to say")
        layout = _LAYOUTS[kind]
        fixed = 8 * layout.numbers
        if not fixed <= length <= fixed + layout.data:
            raise WireError(f"it sends {kind.name} of {length} bytes")
        if len(buffer) < _HEADER.size + length:
            return None
        numbers = struct.unpack_from(f"!{layout.numbers}Q", buffer, _HEADER.size)
        data = bytes(buffer[_HEADER.size + fixed : _HEADER.size + length])
        del buffer[: _HEADER.size + length]
        return Message(kind, tag, numbers, data)
