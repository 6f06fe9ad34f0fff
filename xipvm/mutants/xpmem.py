"""Faults of XPMEM: what is recalled, whether anybody waits for it, and when pages are let go of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xipvm import actors
from xipvm.actors import point
from xipvm.address import PAGE_SHIFT
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.xpmem import Attachment, Pin, RemoteNode, Xpmem
from xipvm.mutants.mutant import mutant, replaced
from xipvm.notifier import MmuNotifierRange, NotifiedMm
from xipvm.xpmem.node import NodeAttachment, XpmemNode
from xipvm.xpmem.wire import Message


@mutant("remote-unpinned-before-the-recall", "M29", "I3", "I5", protocol="modern")
def remote_unpinned_before_the_recall() -> Iterator[None]:
    """The owner lets go of its pages, then has the node drop its translations of them."""
    ask, unpin = Xpmem._ask, Xpmem._unpin

    def asked(self: Xpmem, attachment: Attachment, pins: dict[int, Pin], wait: bool) -> None:
        for page, pin in pins.items():
            if not pin.recall:
                unpin(self, page, pin)
        point("mutant.unpinned")
        ask(self, attachment, pins, wait)

    def once(self: Xpmem, page: int, pin: Pin) -> None:
        if not pin.recall:
            unpin(self, page, pin)

    with replaced(Xpmem, "_ask", asked), replaced(Xpmem, "_unpin", once):
        yield


@mutant("remote-answer-not-awaited", "M29 (wait)", "I3", protocol="modern")
def remote_answer_not_awaited() -> Iterator[None]:
    """The end sends its recalls and returns: the operation goes on while the node still uses the old pages."""
    with replaced(Xpmem, "_await", lambda self, node, patience, recalled: None):
        yield


@mutant("remote-awaited-where-nobody-may-block", "42 (XPMEM)", "lock", protocol="modern")
def remote_awaited_where_nobody_may_block() -> Iterator[None]:
    """The end waits for the node in every range, in those that may not block, too."""
    recall = Xpmem._recall

    def wait_always(self: Xpmem, hits: Iterable[tuple[Attachment, int, int]], *, wait: bool) -> None:
        recall(self, hits, wait=True)

    with replaced(Xpmem, "_recall", wait_always):
        yield


@mutant("remote-not-told-of-others-doings", "X1", "I3", protocol="modern")
def remote_not_told_of_others_doings() -> Iterator[None]:
    """Ranges that somebody else than the owner's threads announces are ignored, as the driver does."""
    register, end = Xpmem.register, Xpmem.invalidate_range_end
    owners: dict[Xpmem, str] = {}

    def registered(self: Xpmem) -> None:
        owners[self] = actors.current.name
        register(self)

    def ended(self: Xpmem, range: MmuNotifierRange) -> None:
        if actors.current.name == owners[self]:
            end(self, range)

    with replaced(Xpmem, "register", registered), replaced(Xpmem, "invalidate_range_end", ended):
        yield


@mutant("remote-keeps-a-partial-page", "X2", "I3", "I5", protocol="modern")
def remote_keeps_a_partial_page() -> Iterator[None]:
    """What is recalled of an attachment is rounded down to pages, so its last one stays when a part of it is used."""
    hits = Xpmem._hits

    def whole(self: Xpmem, start: int, end: int) -> list[tuple[Attachment, int, int]]:
        found = []
        for attachment, first, last in hits(self, start, end):
            segment = attachment.node.permits[attachment.permit].segment
            pages = (segment.hva + segment.size - attachment.window.hva) >> PAGE_SHIFT
            found.append((attachment, first, min(last, attachment.window.gfn + pages)))
        return found

    with replaced(Xpmem, "_hits", whole):
        yield


@mutant("remote-recalled-by-areas-left", "X3", "I3", protocol="modern")
def remote_recalled_by_areas_left() -> Iterator[None]:
    """Recalls go through the areas that are left in the range: of what was unmapped nothing is recalled."""
    hits = Xpmem._hits

    def left(self: Xpmem, start: int, end: int) -> list[tuple[Attachment, int, int]]:
        return [
            hit
            for area in self.mm.areas_in(start, end)
            for hit in hits(self, max(start, area.start), min(end, area.end))
        ]

    with replaced(Xpmem, "_hits", left):
        yield


@mutant("remote-pages-not-pinned", "X4", "I3", "I5", "InternalError", protocol="modern")
def remote_pages_not_pinned() -> Iterator[None]:
    """Pages are granted without a reference, though entries are dropped only when the range ends."""
    pin, unpin = Xpmem._pin, Xpmem._unpin

    def granted(self: Xpmem, attachment: Attachment, page: int, write: bool) -> Pin | None:
        before = attachment.pins.get(page)
        made = pin(self, attachment, page, write)
        if made is not None and made is not before:
            unpin(self, page, made)
        return made

    with replaced(Xpmem, "_pin", granted), replaced(Xpmem, "_unpin", lambda self, page, pin: None):
        yield


@mutant("remote-granted-late", "M7 (XPMEM)", "I4", "I5", "InternalError", protocol="modern")
def remote_granted_late() -> Iterator[None]:
    """Others may run between the lookup of a page and its pin: a recall in between finds nothing to take back."""
    pin, gup = Xpmem._pin, Mm.get_user_pages
    looking: list[object] = []

    def look_up(self: Mm, hva: int, *, write: bool) -> object:
        found = gup(self, hva, write=write)
        if actors.current in looking:
            point("mutant.looked_up")
        return found

    def pinned(self: Xpmem, attachment: Attachment, page: int, write: bool) -> Pin | None:
        looking.append(actors.current)
        try:
            return pin(self, attachment, page, write)
        finally:
            looking.remove(actors.current)

    with replaced(Mm, "get_user_pages", look_up), replaced(Xpmem, "_pin", pinned):
        yield


@mutant("remote-answers-before-it-drops", "X5", "I5", "AssertionError", protocol="modern")
def remote_answers_before_it_drops() -> Iterator[None]:
    """The node says that it has dropped its translations, and does so later."""
    drop = XpmemNode._drop

    def recalled(self: XpmemNode, message: Message) -> None:
        number, first, end = message.numbers
        attachment = self.attachments.get(number)
        self._dropped(message.tag)
        point("mutant.answered")
        if attachment is not None:
            drop(self, attachment, first, min(end, attachment.pages))

    with replaced(XpmemNode, "_recalled", recalled):
        yield


@mutant("remote-drops-one-page-less", "M2 (XPMEM)", "I5", "AssertionError", protocol="modern")
def remote_drops_one_page_less() -> Iterator[None]:
    """The node takes the end of what is recalled for the last page, and keeps that one."""
    drop = XpmemNode._drop

    def short(self: XpmemNode, attachment: NodeAttachment, first: int, end: int) -> list[int]:
        return drop(self, attachment, first, max(end - 1, first + 1))

    with replaced(XpmemNode, "_drop", short):
        yield


@mutant("remote-fenced-after-the-unpin", "X6", "I5", protocol="modern")
def remote_fenced_after_the_unpin() -> Iterator[None]:
    """The pages of a node that does not answer are let go of first, then it is cut off."""
    fence = Xpmem.fence

    def fenced(self: Xpmem, node: RemoteNode, reason: str) -> None:
        if node.fenced:
            return
        for attachment in list(node.attachments.values()):
            self._drop(attachment, dict(attachment.pins))
        point("mutant.unpinned")
        fence(self, node, reason)

    with replaced(Xpmem, "fence", fenced):
        yield


@mutant("remote-pinned-after-release", "M26 (XPMEM)", "I13", "AssertionError", protocol="modern")
def remote_pinned_after_release() -> Iterator[None]:
    """The end of the mm recalls everything, and nothing keeps the next fault from pinning a page again."""
    release = Xpmem.release

    def released(self: Xpmem, mm: NotifiedMm) -> None:
        self._recall([(a, a.window.gfn, a.window.gfn_end) for a in self._attachments()], wait=True)
        point("mutant.recalled")
        release(self, mm)

    with replaced(Xpmem, "release", released):
        yield
