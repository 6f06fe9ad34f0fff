"""A remote node: what has permits, attachments, and translations that an owner may recall at any time.

A node that shares the owner's memory, as partitions of one machine do, reaches frames by itself (``memory``); any other
one reaches them through messages. Either way it has a translation for a page before it uses it, from a GRANT, and keeps
it until a RECALL; *what it does between the two is its own business*, which is what makes recalls necessary.

Messages are worked off by :meth:`XpmemNode.serve`, in the order in which they came: a GRANT is in effect at once. It is
called by whoever waits for an answer, and by whoever attends to the node otherwise; both may be at it at once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from xipvm.actors import give_way, point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import BadInput, DeadlockError, MmError, XipvmError
from xipvm.xpmem.link import Link, LinkClosedError
from xipvm.xpmem.wire import Kind, Message, WireError, text_data

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

RETRIES: Final = 2_000
"""Faults of one access after which nothing will come of it."""
PAGE_MASK: Final = PAGE_SIZE - 1
_AHEAD: Final = 64
"""Pages that are asked for at once, where each takes a message."""


class OwnerGoneError(XipvmError):
    """The owner has ended, or cut this node off; the message says why, as far as that is known."""


class NodeAttachment:
    """A part of a segment: ``size`` bytes, of which the first is at ``lead`` in its first page. Made by ``attach``."""

    __slots__ = ("hva", "id", "lead", "pages", "size", "table")

    def __init__(self, id: int, pages: int, lead: int, size: int) -> None:
        self.id = id
        self.pages = pages
        self.lead = lead
        self.size = size
        self.table: dict[int, tuple[int, bool]] = {}
        """Frame and writability by page: its translations."""
        self.hva = 0
        """Where its first page is in the owner's address space, for traces."""


class XpmemNode:
    """The node ``name`` at one end of ``link``. With ``memory`` it shares the memory of that mm, and tells its trace.

    Errors of the owner's are raised as MmError; when there is no owner any more OwnerGoneError.
    """

    def __init__(self, link: Link, name: str, *, memory: Mm | None = None) -> None:
        self.link = link
        self.name = name
        self.memory = memory
        self.segments: list[str] = []
        """The names that the owner has told of."""
        self.attachments: dict[int, NodeAttachment] = {}
        self.faults = 0
        self.recalls = 0
        """Pages that the owner took back."""
        self.on_recall: Callable[[NodeAttachment, list[int]], object] = lambda attachment, pages: None
        """Called with the pages that were dropped for a recall, before that is answered."""
        self.gone = ""
        """Why the owner let this node go."""
        self._answers: dict[int, Message | None] = {}
        """By tag; None while there is none."""
        self._last_tag = 0

    # ---- segments

    def hello(self) -> None:
        """Introduces itself; must come first."""
        self.segments = self._ask(Kind.HELLO).data.decode(errors="replace").split()

    def get(self, segment: str, *, write: bool = True) -> tuple[int, int]:
        """A permit for ``segment`` (xpmem_get), and its size. Raises MmError: ENOENT, EACCES."""
        permit, size, _ = self._ask(Kind.GET, (write,), text_data(segment)).numbers
        return permit, size

    def attach(self, permit: int, offset: int, size: int, *, hva: int = 0) -> NodeAttachment:
        """Attaches ``size`` bytes from ``offset`` on of what ``permit`` is for (xpmem_attach). Raises MmError: EINVAL.

        ``hva``: where the segment is in the owner's address space, if that is known, for traces.
        """
        number, pages, lead = self._ask(Kind.ATTACH, (permit, offset, size)).numbers
        made = self.attachments[number] = NodeAttachment(number, pages, lead, size)
        made.hva = max(hva + offset - lead, 0)
        return made

    def detach(self, attachment: NodeAttachment) -> None:
        """Drops every translation, then the attachment (xpmem_detach). Raises MmError: EINVAL."""
        self._drop(attachment, 0, attachment.pages)
        self.attachments.pop(attachment.id, None)
        self._ask(Kind.DETACH, (attachment.id,))

    def release(self, permit: int) -> None:
        """Gives a permit back, whose attachments have been detached (xpmem_release). Raises MmError: EINVAL."""
        self._ask(Kind.RELEASE, (permit,))

    def close(self) -> None:
        """Leaves without a word. What it had translated it does not use any more."""
        for attachment in self.attachments.values():
            self._drop(attachment, 0, attachment.pages)
        self.attachments.clear()
        self.link.close()

    # ---- memory

    def load(self, attachment: NodeAttachment, offset: int, size: int) -> bytes:
        """Bytes of the attachment. Raises MmError: EFAULT for what is not there, EINVAL outside of it."""
        pieces = self._pieces(attachment, offset, size)
        if self.memory is None and len(pieces) > 1:
            parts = []
            for at in range(0, len(pieces), _AHEAD):
                parts += self._load_many(attachment, pieces[at : at + _AHEAD])
        else:
            parts = [self._load(attachment, *piece) for piece in pieces]
        return b"".join(parts)

    def store(self, attachment: NodeAttachment, offset: int, data: bytes) -> None:
        """Puts ``data`` there, a page at a time. Raises MmError: EFAULT, EACCES, EINVAL."""
        done = 0
        for page, at, size in self._pieces(attachment, offset, len(data)):
            self._store(attachment, page, at, data[done : done + size])
            done += size

    @staticmethod
    def _pieces(attachment: NodeAttachment, offset: int, size: int) -> list[tuple[int, int, int]]:
        """Page, offset in it and size of each part."""
        if offset < 0 or size < 0 or offset + size > attachment.size:
            raise MmError(errno.EINVAL, f"{size:#x} bytes at {offset:#x} of {attachment.size:#x}")
        at, end, pieces = attachment.lead + offset, attachment.lead + offset + size, []
        while at < end:
            length = min(PAGE_SIZE - (at & PAGE_MASK), end - at)
            pieces.append((at >> PAGE_SHIFT, at & PAGE_MASK, length))
            at += length
        return pieces

    def _load(self, attachment: NodeAttachment, page: int, at: int, size: int) -> bytes:
        while True:
            frame = self._translate(attachment, page, False)
            if self.memory is not None:
                return self.memory.host.read(frame, at, size)
            answer = self._ask(Kind.LOAD, (attachment.id, page, frame, at, size))
            if answer.kind is Kind.DATA and len(answer.data) == size:
                return answer.data
            self._refused(attachment, page, frame, answer)

    def _load_many(self, attachment: NodeAttachment, pieces: list[tuple[int, int, int]]) -> list[bytes]:
        """As :meth:`_load` for each, but asks for all of them before it waits for the first."""
        table = attachment.table
        self.serve()
        missing = [page for page, _, _ in pieces if page not in table]
        self.faults += len(missing)
        self._ask_all([(Kind.FAULT, (attachment.id, page, 0), b"") for page in missing])
        ready = [(page, at, size, table[page][0]) for page, at, size in pieces if page in table]
        asked = [(Kind.LOAD, (attachment.id, page, frame, at, size), b"") for page, at, size, frame in ready]
        found = {
            page: answer.data
            for (page, _, size, _), answer in zip(ready, self._ask_all(asked), strict=True)
            if answer.kind is Kind.DATA and len(answer.data) == size
        }
        # What was taken back meanwhile has to be asked for again.
        return [found[page] if page in found else self._load(attachment, page, at, size) for page, at, size in pieces]

    def _store(self, attachment: NodeAttachment, page: int, at: int, data: bytes) -> None:
        while True:
            frame = self._translate(attachment, page, True)
            if self.memory is not None:
                self.memory.host.write(frame, at, data)
                return
            answer = self._ask(Kind.STORE, (attachment.id, page, frame, at), data)
            if answer.kind is Kind.DONE:
                return
            self._refused(attachment, page, frame, answer)

    def _refused(self, attachment: NodeAttachment, page: int, frame: int, answer: Message) -> None:
        """A page was recalled while the request for it was underway."""
        if answer.kind is not Kind.AGAIN:
            raise OwnerGoneError(f"the owner answers with {answer.kind.name}")
        if attachment.table.get(page, (None,))[0] == frame:
            self._drop(attachment, page, page + 1)

    def _translate(self, attachment: NodeAttachment, page: int, write: bool) -> int:
        """The frame of ``page``, faulted in if need be. No schedule point comes behind the last look."""
        point("xpmem.access")
        for _ in range(RETRIES):
            if self.memory is None:
                self.serve()
            if self.link.closed:
                raise self.gone_error()
            seen = attachment.table.get(page)
            if seen is not None and (seen[1] or not write):
                return seen[0]
            self.faults += 1
            answer = self._ask(Kind.FAULT, (attachment.id, page, write))
            if answer.kind is Kind.AGAIN:
                give_way("xpmem.again")
        raise DeadlockError(f"{self.name} faults on page {page:#x} again and again")

    # ---- messages

    def _ask(self, kind: Kind, numbers: tuple[int, ...] = (), data: bytes = b"") -> Message:
        """Sends a request and sleeps until its answer is there."""
        return self._ask_all([(kind, numbers, data)])[0]

    def _ask_all(self, requests: Sequence[tuple[Kind, tuple[int, ...], bytes]]) -> list[Message]:
        """Sends requests and sleeps until all of their answers are there."""
        answers, tags = self._answers, list[int]()
        try:
            for kind, numbers, data in requests:
                self._last_tag = tag = self._last_tag % 0xFFFF_FFFF + 1
                answers[tag] = None
                tags.append(tag)
                self._send(Message(kind, tag, numbers, data))
            for tag, (kind, _, _) in zip(tags, requests, strict=True):
                while answers[tag] is None:
                    self._wait_for(tag, kind)
            found = [answer for tag in tags if (answer := answers[tag]) is not None]
        finally:
            for tag in tags:
                del answers[tag]
        for answer in found:
            if answer.kind is Kind.ERROR:
                number = answer.numbers[0]
                raise MmError(number if number in errno.errorcode else errno.EIO, _reason(answer.text, number))
        return found

    def _wait_for(self, tag: int, kind: Kind) -> None:
        if self.link.closed:
            raise self.gone_error()
        patience = self.link.patience()
        if not self.link.wait(f"the answer to {kind.name}", lambda: self._answers[tag] is not None, patience):
            raise OwnerGoneError(f"the owner does not answer {kind.name}")
        self.serve()

    def _send(self, message: Message) -> None:
        try:
            self.link.send(message)
        except LinkClosedError:
            raise self.gone_error() from None

    def gone_error(self) -> OwnerGoneError:
        """What to raise when the link is closed."""
        return OwnerGoneError(self.gone or "the owner has cut this node off, or has ended")

    def serve(self) -> int:
        """Works off what has arrived; how many messages. Raises WireError, and the link is closed, for nonsense."""
        served = 0
        try:
            while (message := self.link.receive()) is not None:
                self._handle(message)
                served += 1
        except WireError:
            self.link.close()
            raise
        return served

    def _handle(self, message: Message) -> None:
        if message.kind is Kind.RECALL:
            self._recalled(message)
        elif message.kind is Kind.GONE:
            self.gone = message.text or "the owner has ended"
            self.link.close()
        elif message.tag in self._answers:
            if message.kind is Kind.GRANT:
                self._granted(*message.numbers)
            self._answers[message.tag] = message
        elif message.kind is Kind.ERROR and not message.tag:
            raise WireError(message.text)

    def _granted(self, number: int, page: int, frame: int, write: int) -> None:
        attachment = self.attachments.get(number)
        if attachment is None or page >= attachment.pages:
            return
        attachment.table[page] = frame, bool(write)
        if self.memory is not None and self.memory.trace.on:
            self.memory.trace.emit(
                "device_tlb_insert", mm=self.memory.name, hva=attachment.hva + (page << PAGE_SHIFT), pfn=frame,
                rights="rw" if write else "r", device=self.name,
            )  # fmt: skip

    def _recalled(self, message: Message) -> None:
        number, first, end = message.numbers
        attachment = self.attachments.get(number)
        point("xpmem.recalled")
        if attachment is not None:
            pages = self._drop(attachment, first, min(end, attachment.pages))
            self.recalls += len(pages)
            self.on_recall(attachment, pages)
        self._dropped(message.tag)

    def _dropped(self, tag: int) -> None:
        try:
            self.link.send(Message(Kind.DROPPED, tag))
        except LinkClosedError:
            return  # it was too late

    def _drop(self, attachment: NodeAttachment, first: int, end: int) -> list[int]:
        """Forgets translations; of which pages."""
        table = attachment.table
        few = range(first, end) if end - first < len(table) else sorted(table)
        pages = [page for page in few if first <= page < end and page in table]
        for page in pages:
            del table[page]
        if pages and self.memory is not None and self.memory.trace.on:
            hva = attachment.hva
            self.memory.trace.emit(
                "device_tlb_drop", mm=self.memory.name, start=hva + (first << PAGE_SHIFT),
                end=hva + (end << PAGE_SHIFT), device=self.name,
            )  # fmt: skip
        return pages


def _reason(text: str, number: int) -> str:
    """The owner's text without what MmError says anyway."""
    name = errno.errorcode.get(number, "")
    return text.removesuffix(f": {name} ({os.strerror(number)})") if name else text


def only_segment(node: XpmemNode, name: str | None) -> str:
    """The segment ``name``, or the only one that the owner has. Raises BadInput."""
    if name is None and len(node.segments) == 1:
        return node.segments[0]
    known = ", ".join(node.segments) or "none"
    if name is None:
        raise BadInput(f"which segment? Name one of {known}")
    if name not in node.segments:
        raise BadInput(f"there is no segment {name!r}; there are {known}")
    return name
