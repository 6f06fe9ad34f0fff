"""XPMEM, the owner's side: parts of an address space that remote nodes use, and recalls.

An owner makes *segments* of its memory, a node gets a *permit* for one and *attaches* a part of it; the names are those
of the driver (xpmem_make, xpmem_get, xpmem_attach). A page of an attachment that the node touches is looked up by
get_user_pages and **pinned**: one reference for each page of each attachment. From then on the node has a translation
to its frame, until the owner recalls it.

It needs nothing but ``invalidate_range_end``. A pin keeps the frame from being freed or given to anybody else, so the
node may go on with it while the entries of the mm change: it sees the old page until the end, and the new one after.
::

    range start → entries change → range end → RECALL to the node → it drops its translations → DROPPED → unpin
                                              └──────────────── the end returns ─────────────────┘

What makes that right:

* the pin, its record and the GRANT are made behind the lookup with no schedule point in between. So an end either comes
  after them and finds the pin, or before the lookup, which finds the new entry;
* a link keeps order: the RECALL of a page comes behind its GRANT; while a page is being recalled it is not granted;
* ``invalidate_range_end`` **sleeps** for the answer. So it can be nobody's callback in the protocol of 2008, where
  nobody may sleep: :meth:`Xpmem.register` refuses;
* a range that may not block (the OOM reaper's) cannot be declined either: who has an end may not, for it could not know
  whether its start had failed. Pages of such a range are recalled, and nobody waits: they stay pinned, hence unfreed
  and unused by others, until the answer comes. For so long the node sees what the mm has given up;
* ranges are rounded out to pages, and every page of the range is recalled, whoever changes it, whether areas are left
  there or not. (The driver looks at the areas that are left, and returns at once when somebody else than the owner's
  threads is at work, so that a file which another process truncates stays readable.)

A node that does not answer in time, or breaks the protocol, or goes away without a word is **fenced**: first its link
is closed, by which it reached memory, then its pages are unpinned. It never gets anything again. A node that says
DROPPED and has not is not found out; but its loads and stores name frames, and one that is not pinned for it is refused
where memory is reached through messages (see export.py): what it can read is what it was granted.

Not modelled: attachments inside an address space of this host, which the driver maps by remap_pfn_range; hence nothing
has to be skipped because it is an attachment itself. What the driver's mutexes do is done by there being no schedule
point: pins change in one piece.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Gfn, Hva, page_up
from xipvm.errors import InternalError, MmError, ProtocolUnsupported
from xipvm.locks.check import might_sleep
from xipvm.mmu.frames import ZERO_PFN
from xipvm.mmu.secondary.base import FAULT, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.device import DeviceMmu
from xipvm.mmu.secondary.memslot import GFN_LIMIT, HVA_LIMIT, Memslot
from xipvm.xpmem.link import Link, LinkClosedError
from xipvm.xpmem.wire import TEXT_LIMIT, Kind, Message, WireError, text_data

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.notifier import MmuNotifierRange, NotifiedMm

PERMIT_LIMIT: Final = 256
ATTACHMENT_LIMIT: Final = 256
"""Of one node; more are EMFILE."""
REQUEST_LIMIT: Final = 256
"""Requests of one node that wait to be served; with more it is fenced."""
_ALL: Final = (1 << 64) - 1


class Segment:
    """``size`` bytes of the mm from ``hva`` on that nodes may get by ``name``, to write to if ``writable``."""

    __slots__ = ("hva", "name", "segid", "size", "writable")

    def __init__(self, segid: int, name: str, hva: int, size: int, writable: bool) -> None:
        self.segid = segid
        self.name = name
        self.hva = hva
        self.size = size
        self.writable = writable


class Permit:
    """That a node may attach ``segment``, an access permit."""

    __slots__ = ("segment", "write")

    def __init__(self, segment: Segment, write: bool) -> None:
        self.segment = segment
        self.write = write


class Pin:
    """A reference to the frame behind a page. ``recall`` is the tag of the RECALL that is underway, 0 for none."""

    __slots__ = ("pfn", "recall", "write")

    def __init__(self, pfn: int, write: bool) -> None:
        self.pfn = pfn
        self.write = write
        self.recall = 0


class Attachment:
    """A part of a segment that a node uses: pages of the owner's own numbers, ``window``, and what of it is pinned."""

    __slots__ = ("node", "permit", "pins", "window")

    def __init__(self, node: RemoteNode, permit: int, window: Memslot) -> None:
        self.node = node
        self.permit = permit
        self.window = window
        self.pins: dict[int, Pin] = {}
        """By page."""

    def pins_in(self, first: int, last: int) -> dict[int, Pin]:
        """Those of pages ``[first, last)``."""
        pins = self.pins
        if last - first > len(pins):
            return {page: pin for page, pin in pins.items() if first <= page < last}
        return {page: pins[page] for page in range(first, last) if page in pins}

    @property
    def write(self) -> bool:
        """The permit it was made by allows it."""
        return self.node.permits[self.permit].write


class RemoteNode:
    """What the owner knows of one node. ``fenced`` says why it was cut off; empty while it is not."""

    __slots__ = ("attachments", "fenced", "greeted", "last_tag", "link", "name", "permits", "recalls", "requests")

    def __init__(self, link: Link) -> None:
        self.name = link.name
        self.link = link
        self.greeted = False
        self.fenced = ""
        self.permits: dict[int, Permit] = {}
        self.attachments: dict[int, Attachment] = {}
        self.requests: deque[Message] = deque()
        self.recalls: dict[int, tuple[Attachment, dict[int, Pin]]] = {}
        """By tag, those that were not answered."""
        self.last_tag = 0


class Xpmem(DeviceMmu):
    """The segments of ``mm`` and their nodes. ``register`` it; errors of memory are MmError, as everywhere.

    ``on_fence`` is called with each node that was cut off, when that is done.
    """

    def __init__(self, mm: Mm, *, name: str = "xpmem0") -> None:
        super().__init__(mm, name=name)
        self.segments: dict[str, Segment] = {}
        self.nodes: list[RemoteNode] = []
        self.on_fence: Callable[[RemoteNode], object] = lambda node: None
        self.recalled = 0
        """Pages that were recalled so far."""
        self._dead = False
        self._last_id = 0

    def register(self) -> None:
        """Have it told of the changes of its mm. Raises ProtocolUnsupported in the protocol of 2008, and MmError."""
        if self.mm.notifiers.protocol != "modern":
            what = "XPMEM, whose callback sleeps until remote nodes have answered"
            raise ProtocolUnsupported(what, self.mm.notifiers.protocol)
        self.mm.notifiers.register(self)

    # ---- segments

    def make(self, name: str, hva: int, size: int, *, writable: bool = True) -> Segment:
        """Lets nodes get ``[hva, hva + size)`` by ``name`` (xpmem_make). What is mapped there shows when it is used.

        Raises MmError: EINVAL for a bad range or name, EEXIST, ESRCH when the mm is dead.
        """
        named = name.isprintable() and name == "".join(name.split()) and 0 < len(name.encode()) <= TEXT_LIMIT
        if size <= 0 or hva < 0 or hva + size > HVA_LIMIT or not named:
            raise MmError(errno.EINVAL, f"segment {name!r} of {size:#x} bytes at {hva:#x}")
        if name in self.segments:
            raise MmError(errno.EEXIST, f"segment {name!r}")
        if self._dead:
            raise MmError(errno.ESRCH, f"segment {name!r} of {self.mm.name}")
        self._last_id += 1
        made = self.segments[name] = Segment(self._last_id, name, hva, size, writable)
        return made

    def remove(self, name: str) -> None:
        """The segment goes, with its attachments, whose pages are recalled first (xpmem_remove). Sleeps.

        Raises MmError ENOENT.
        """
        segment = self.segments.pop(name, None)
        if segment is None:
            raise MmError(errno.ENOENT, f"segment {name!r}")
        gone = [a for a in self._attachments() if a.node.permits[a.permit].segment is segment]
        self._recall([(a, a.window.gfn, a.window.gfn_end) for a in gone], wait=True)
        for attachment in gone:
            self._detach(attachment)
        for node in self.nodes:
            for apid in [apid for apid, permit in node.permits.items() if permit.segment is segment]:
                del node.permits[apid]

    # ---- nodes

    def connect(self, link: Link) -> RemoteNode:
        """A node is at the other end of ``link``; it has to say HELLO first."""
        node = RemoteNode(link)
        self.nodes.append(node)
        return node

    def serve(self, node: RemoteNode) -> int:
        """Takes what ``node`` has sent and answers its requests; how many. Raises nothing for what the node does.

        Looks up pages, so it may sleep, and nobody may hold locks of the mm.
        """
        self._receive(node)
        served = 0
        while node.requests and not node.fenced:
            request = node.requests.popleft()
            try:
                answer = self._answer(node, request)
            except MmError as error:
                answer = Message(Kind.ERROR, request.tag, (error.errno,), text_data(str(error)))
            self._send(node, answer)
            served += 1
            self._receive(node)
        return served

    def fence(self, node: RemoteNode, reason: str) -> None:
        """Cuts ``node`` off, then unpins what it had. A second call does nothing."""
        if node.fenced:
            return
        node.fenced = reason
        node.link.close()  # it reaches nothing any more: only now may frames go
        trace = self.trace
        if trace.on:
            trace.emit("xpmem_fence", vm=self.name, node=node.name, reason=reason)
            trace.emit("device_tlb_drop", mm=self.mm.name, start=0, end=_ALL, device=node.name)
        self._forget(node)
        self.on_fence(node)

    def _forget(self, node: RemoteNode) -> None:
        for attachment in list(node.attachments.values()):
            self._detach(attachment)
        node.permits.clear()
        node.recalls.clear()
        node.requests.clear()
        if node in self.nodes:
            self.nodes.remove(node)

    def _send(self, node: RemoteNode, message: Message) -> None:
        try:
            node.link.send(message)
        except LinkClosedError as error:
            self.fence(node, str(error))

    def _receive(self, node: RemoteNode) -> None:
        """Takes what has arrived: answers to recalls are settled, requests wait."""
        while not node.fenced:
            try:
                message = node.link.receive()
            except WireError as error:
                self._send(node, Message(Kind.GONE, 0, (), text_data(str(error))))
                self.fence(node, str(error))
                return
            if message is None:
                if node.link.closed and node.attachments:
                    self.fence(node, "it has gone without a word")
                elif node.link.closed:
                    node.link.close()
                    self._forget(node)
                return
            if message.kind is not Kind.DROPPED:
                node.requests.append(message)
                if len(node.requests) > REQUEST_LIMIT:
                    self.fence(node, f"it sends more than {REQUEST_LIMIT} requests without waiting for an answer")
            elif message.tag in node.recalls:
                attachment, pins = node.recalls.pop(message.tag)
                self._drop(attachment, pins)
            else:
                self.fence(node, "it answers a recall that nobody made")

    # ---- requests

    def _answer(self, node: RemoteNode, request: Message) -> Message:
        kind, tag, numbers, _ = request
        if (kind is Kind.HELLO) == node.greeted:
            raise MmError(errno.EPROTO, f"{kind.name} {'again' if node.greeted else 'before HELLO'}")
        if kind is Kind.HELLO:
            node.greeted = True
            return Message(Kind.WELCOME, tag, (), "\n".join(self.segments).encode()[: 64 * 256])
        if self._dead:
            raise MmError(errno.ESRCH, self.mm.name)
        if kind is Kind.GET:
            return self._get(node, tag, request.data.decode(errors="replace"), bool(numbers[0]))
        if kind is Kind.ATTACH:
            return self._attach(node, tag, *numbers)
        if kind is Kind.RELEASE:
            if numbers[0] not in node.permits:
                raise MmError(errno.EINVAL, f"permit {numbers[0]}")
            for attachment in [a for a in node.attachments.values() if a.permit == numbers[0]]:
                self._detach(attachment)
            del node.permits[numbers[0]]
            return Message(Kind.DONE, tag)
        attachment = self._attachment(node, numbers[0])
        if kind is Kind.FAULT:
            return self._fault(attachment, tag, numbers[1], bool(numbers[2]))
        if kind is Kind.LOAD:
            return self._load(attachment, tag, *numbers[1:])
        if kind is Kind.STORE:
            return self._store(attachment, tag, request.data, *numbers[1:])
        if kind is Kind.DETACH:
            self._detach(attachment)
            return Message(Kind.DONE, tag)
        raise MmError(errno.EPROTO, kind.name)

    def _get(self, node: RemoteNode, tag: int, name: str, write: bool) -> Message:
        segment = self.segments.get(name)
        if segment is None:
            raise MmError(errno.ENOENT, f"segment {name!r}")
        if write and not segment.writable:
            raise MmError(errno.EACCES, f"segment {name!r} may be read only")
        if len(node.permits) >= PERMIT_LIMIT:
            raise MmError(errno.EMFILE, f"{PERMIT_LIMIT} permits")
        self._last_id += 1
        node.permits[self._last_id] = Permit(segment, write)
        return Message(Kind.PERMIT, tag, (self._last_id, segment.size, write))

    def _attach(self, node: RemoteNode, tag: int, apid: int, offset: int, size: int) -> Message:
        permit = node.permits.get(apid)
        if permit is None:
            raise MmError(errno.EINVAL, f"permit {apid}")
        segment = permit.segment
        if not size or offset + size > segment.size:
            raise MmError(errno.EINVAL, f"{size:#x} bytes at {offset:#x} of segment {segment.name!r}")
        if len(node.attachments) >= ATTACHMENT_LIMIT:
            raise MmError(errno.EMFILE, f"{ATTACHMENT_LIMIT} attachments")
        first, end = (segment.hva + offset) & PAGE_MASK, page_up(segment.hva + offset + size)
        pages = (end - first) >> PAGE_SHIFT
        window = self.map_window(first, pages, page=self._room(pages))
        node.attachments[window.id] = Attachment(node, apid, window)
        return Message(Kind.ATTACHED, tag, (window.id, pages, segment.hva + offset - first))

    def _room(self, pages: int) -> int:
        """The first page of so many that no attachment has."""
        at = 0
        for window in self.windows:
            if window.gfn - at >= pages:
                break
            at = window.gfn_end
        if at + pages > GFN_LIMIT:
            raise MmError(errno.ENOMEM, f"attachments of {GFN_LIMIT:#x} pages")
        return at

    def _attachment(self, node: RemoteNode, number: int) -> Attachment:
        attachment = node.attachments.get(number)
        if attachment is None:
            raise MmError(errno.EINVAL, f"attachment {number}")
        return attachment

    def _fault(self, attachment: Attachment, tag: int, index: int, write: bool) -> Message:
        window = attachment.window
        if index >= window.pages:
            raise MmError(errno.EFAULT, f"page {index:#x} of attachment {window.id}")
        if write and not attachment.write:
            raise MmError(errno.EACCES, f"attachment {window.id} may be read only")
        pin = self._pin(attachment, window.gfn + index, write)
        if pin is None:
            return Message(Kind.AGAIN, tag)
        return Message(Kind.GRANT, tag, (window.id, index, pin.pfn, pin.write))

    def _pinned(self, attachment: Attachment, index: int, frame: int, offset: int, size: int) -> Pin | None:
        """The pin by which the node may use so many bytes, None when it was recalled. Raises EFAULT."""
        if index >= attachment.window.pages or offset + size > PAGE_SIZE:
            raise MmError(errno.EFAULT, f"{size:#x} bytes at {offset:#x} of page {index:#x}")
        pin = attachment.pins.get(attachment.window.gfn + index)
        return pin if pin is not None and pin.pfn == frame else None

    def _load(self, attachment: Attachment, tag: int, index: int, frame: int, offset: int, size: int) -> Message:
        if self._pinned(attachment, index, frame, offset, size) is None:
            return Message(Kind.AGAIN, tag)
        return Message(Kind.DATA, tag, (), self.mm.host.read(frame, offset, size))

    def _store(self, attachment: Attachment, tag: int, data: bytes, index: int, frame: int, offset: int) -> Message:
        pin = self._pinned(attachment, index, frame, offset, len(data))
        if pin is None:
            return Message(Kind.AGAIN, tag)
        if not pin.write:
            raise MmError(errno.EFAULT, f"page {index:#x} was granted for reading")
        self.mm.host.write(frame, offset, data)
        return Message(Kind.DONE, tag)

    # ---- pins

    def _pin(self, attachment: Attachment, page: int, write: bool) -> Pin | None:
        """Looks ``page`` up and holds its frame; None when it has to be asked for again. Raises MmError."""
        hva = attachment.window.hva_of(Gfn(page))
        point("xpmem.fault")
        found = self.mm.get_user_pages(hva, write=write)
        # From here to the GRANT, nobody else runs: an end that comes now finds the pin.
        if self._dead or attachment.node.attachments.get(attachment.window.id) is not attachment:
            raise MmError(errno.EINVAL, f"attachment {attachment.window.id} has gone")
        pin = attachment.pins.get(page)
        if pin is not None and (pin.recall or pin.pfn != found.pfn):
            return None  # the node still has the old page
        if pin is None:
            self.mm.host.pin(found.pfn)
            pin = attachment.pins[page] = Pin(found.pfn, write)
            if self.trace.on:
                self.trace.emit("page_pin", vm=self.name, gfn=page, pfn=pin.pfn)
        elif pin.write or not write:
            return pin
        pin.write = write
        if write:
            self.set_page_dirty(pin.pfn)
        if self.trace.on:
            self.trace.emit("spte_set", vm=self.name, gfn=page, pfn=pin.pfn, rights="rw" if write else "r")
        return pin

    def _drop(self, attachment: Attachment, pins: dict[int, Pin]) -> None:
        """The node translates those of ``pins`` that are still there no longer: they are unpinned."""
        for page in sorted(pins):
            pin = pins[page]
            if attachment.pins.get(page) is pin:
                del attachment.pins[page]
                if self.trace.on:
                    self.trace.emit("spte_zap", vm=self.name, start=page, end=page + 1, pages=[(pin.pfn, 1)])
                self._unpin(page, pin)

    def _unpin(self, page: int, pin: Pin) -> None:
        if pin.write and pin.pfn != ZERO_PFN:
            self.set_page_dirty(pin.pfn)
        if self.trace.on:
            self.trace.emit("page_unpin", vm=self.name, gfn=page, pfn=pin.pfn)
        self.mm.unpin_frame(pin.pfn)

    def _detach(self, attachment: Attachment) -> None:
        """The attachment goes, with its pins; the node knows, or has been cut off."""
        attachment.node.attachments.pop(attachment.window.id, None)
        self._drop(attachment, dict(attachment.pins))
        if self.windows.get(attachment.window.id) is attachment.window:
            self.unmap_window(attachment.window)

    def _attachments(self) -> list[Attachment]:
        return [attachment for node in self.nodes for attachment in node.attachments.values()]

    # ---- recalls

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """Recalls what nodes have of the range; waits for them, unless the range may not block."""
        hits = self._hits(range.start, range.end)
        if hits:
            self._recall(hits, wait=range.blockable)

    def _hits(self, start: int, end: int) -> list[tuple[Attachment, int, int]]:
        """The attachments with their pages, half-open, that show a byte of ``[start, end)``."""
        hits = []
        for attachment in self._attachments():
            window = attachment.window
            if window.hva < end and start < window.hva_end and attachment.pins:
                first = window.gfn + ((max(start, window.hva) - window.hva) >> PAGE_SHIFT)
                last = window.gfn + (page_up(min(end, window.hva_end) - window.hva) >> PAGE_SHIFT)
                hits.append((attachment, first, last))
        return hits

    def _recall(self, hits: Iterable[tuple[Attachment, int, int]], *, wait: bool) -> None:
        """Takes the pages back: all nodes are asked, then each is waited for, and fenced when its time is over."""
        asked: dict[RemoteNode, tuple[float, list[tuple[Attachment, dict[int, Pin]]]]] = {}
        for attachment, first, last in hits:
            pins = attachment.pins_in(first, last)
            if pins:
                node = attachment.node
                asked.setdefault(node, (node.link.patience(), []))[1].append((attachment, pins))
                self._ask(attachment, pins, wait)
        if not wait or not asked:
            return
        might_sleep("xpmem recall")
        for node, (patience, recalled) in asked.items():
            self._await(node, patience, recalled)

    def _ask(self, attachment: Attachment, pins: dict[int, Pin], wait: bool) -> None:
        """Sends RECALL for what is not being recalled already."""
        node, window = attachment.node, attachment.window
        new = {page: pin for page, pin in pins.items() if not pin.recall}
        first, last = min(pins), max(pins) + 1
        if self.trace.on:
            self.trace.emit("xpmem_recall", vm=self.name, start=first, end=last, node=node.name, wait=wait)
        if not new or node.fenced:
            return
        node.last_tag = tag = node.last_tag % 0xFFFF_FFFF + 1
        for pin in new.values():
            pin.recall = tag
        self.recalled += len(new)
        node.recalls[tag] = attachment, new
        self._send(node, Message(Kind.RECALL, tag, (window.id, min(new) - window.gfn, max(new) + 1 - window.gfn)))

    def _await(self, node: RemoteNode, patience: float, recalled: list[tuple[Attachment, dict[int, Pin]]]) -> None:
        def done() -> bool:
            return not any(a.pins.get(page) is pin for a, pins in recalled for page, pin in pins.items())

        while not done() and not node.fenced:
            answered = node.link.wait(f"{node.name}'s answer to a recall", done, patience)
            self._receive(node)
            if not answered and not done():
                pages = sum(len(pins) for _, pins in recalled)
                self.fence(node, f"it has not answered the recall of {pages} page{'s' if pages != 1 else ''} in time")

    def release(self, mm: NotifiedMm) -> None:
        """The end of the mm, or of the owner: every page is recalled, every node let go. Nothing can be pinned again.

        May run twice, also at once.
        """
        self._dead = True
        self._recall([(a, a.window.gfn, a.window.gfn_end) for a in self._attachments()], wait=True)
        self.segments.clear()
        for node in list(self.nodes):
            self._send(node, Message(Kind.GONE, 0, (), text_data("the owner has ended")))
            node.link.close()
            self._forget(node)

    # ---- a secondary MMU

    def fault(self, page: int, access: int) -> int:
        """See the base: pins ``page`` of an attachment for its node, who is not told."""
        if access not in (READ, WRITE):
            raise InternalError(f"access {access} of a remote node")
        for attachment in self._attachments():
            if attachment.window.gfn <= page < attachment.window.gfn_end:
                try:
                    self._pin(attachment, page, access == WRITE)
                except MmError as error:
                    self.last_error = os.strerror(error.errno)
                    return FAULT
                return RETRY_WALK
        self.last_error = "no attachment"
        return FAULT

    def translate(self, page: int) -> tuple[int, bool] | None:
        """See the base: what the node of ``page`` may have."""
        for attachment in self._attachments():
            pin = attachment.pins.get(page)
            if pin is not None:
                return pin.pfn, pin.write
        return None

    def held(self) -> Iterator[tuple[int, Hva]]:
        """See the base. Without what is being recalled: that stays what it was until the node has answered."""
        for page, hva in self.backing():
            pins = [pin for each in self._attachments() if (pin := each.pins.get(page)) is not None]
            if pins and not any(pin.recall for pin in pins):
                yield page, hva

    def pins(self) -> dict[int, int]:
        """The references that it holds, by frame."""
        held: dict[int, int] = {}
        for pfn in self._pinned_frames():
            held[pfn] = held.get(pfn, 0) + 1
        return held

    def _pinned_frames(self) -> Iterator[int]:
        for attachment in self._attachments():
            for pin in attachment.pins.values():
                if pin.pfn != ZERO_PFN:
                    yield pin.pfn
