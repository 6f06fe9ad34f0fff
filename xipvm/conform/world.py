"""The world that a scenario plays in: one host process, its mappings, files and VMs, and what can be observed of them.

Everything is done through the public interface of the model. What a step does is seen in three ways: the notifier calls
that reach a :class:`Probe` beside each VM, the events of the trace, and the tables before and after.

A frame is identified by its number and by when it was allocated, as numbers are reused at once: two frames that had the
same number one after the other are different :class:`Frame` values.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, Final, NamedTuple, TypeVar

from xipvm.actors import on_point, on_wait
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.conform.guest import Vcpu
from xipvm.conform.schema import LIMIT, SPACES
from xipvm.errors import MmError
from xipvm.mmu.frames import PG_ANON, ZERO_PFN, HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.mm import Mm
from xipvm.mmu.page_cache import PageCache
from xipvm.mmu.pte import GUARD, HUGE, MAPPED, SPECIAL, SWAP, pte_pfn
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.userfaultfd import Userfaultfd
from xipvm.mmu.vma import TASK_SIZE
from xipvm.notifier import MmuNotifier, MmuNotifierRange, NotifiedMm
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

MEMORY: Final = 256 << 20
"""Of the host, bytes."""
HUGE_PAGES: Final = 512

BASE: Final = {name: (number + 1) * (LIMIT << PAGE_SHIFT) for number, name in enumerate(SPACES)}
"""Where each space begins, in bytes: 64 GiB apart."""


T = TypeVar("T")


class UnsupportedError(Exception):
    """The model does not have the operation (yet). ``op`` names it."""

    def __init__(self, op: str) -> None:
        super().__init__(op)
        self.op = op


class _MustWaitError(Exception):
    """The vCPU would have to wait for the host: it tries again at the next point."""


def _must_wait(what: str, ready: Callable[[], bool]) -> None:
    raise _MustWaitError(what)


class Frame(NamedTuple):
    """One physical frame, from its allocation until it is freed."""

    pfn: int
    born: int
    """Which allocation it came from, counted from 1; 0 for frames that were never allocated."""


class Cell(NamedTuple):
    """What a primary entry holds: ``frame`` (and which), ``zero``, ``hugezero``, ``swap``, ``guard``, ``none``."""

    word: str
    frame: Frame | None = None


NOTHING: Final = Cell("none")
Table = dict[int, Cell]
"""Entries that are not empty, by page of their space."""


class Call(NamedTuple):
    """One call of a notifier; without a range for ``release``, with space ``mm`` for all of the address space."""

    call: str
    event: str = ""
    space: str = ""
    start: int = 0
    end: int = 0

    def __str__(self) -> str:
        where = f"{self.space}[{self.start},{self.end})" if self.space not in ("", "mm") else self.space
        return " ".join(word for word in (self.call, self.event, where) if word)


class Probe(MmuNotifier):
    """Stands beside the notifier of one VM and notes the calls that it gets."""

    def __init__(self, calls: list[Call], name: str) -> None:
        self.calls = calls
        self.name = f"probe of {name}"

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """See the base."""
        self.calls.append(_located("invalidate_range_start", range.event.name, range.start, range.end))
        return 0

    def clear_flush_young(self, start: int, end: int) -> bool:
        """See the base. Only KVM's answer counts."""
        self.calls.append(_located("clear_flush_young", "", start, end))
        return False

    def clear_young(self, start: int, end: int) -> bool:
        """See the base."""
        self.calls.append(_located("clear_young", "", start, end))
        return False

    def test_young(self, address: int) -> bool:
        """See the base."""
        self.calls.append(_located("test_young", "", address, address + PAGE_SIZE))
        return False

    def release(self, mm: NotifiedMm) -> None:
        """See the base."""
        self.calls.append(Call("release"))


def _located(call: str, event: str, start: int, end: int) -> Call:
    """The call with its range in pages of the space that it begins in."""
    if start == 0 and end >= TASK_SIZE:
        return Call(call, event, "mm")
    for space, base in BASE.items():
        if base <= start < base + (LIMIT << PAGE_SHIFT):
            return Call(call, event, space, (start - base) >> PAGE_SHIFT, (end - base) >> PAGE_SHIFT)
    return Call(call, event, "elsewhere", start >> PAGE_SHIFT, end >> PAGE_SHIFT)


class Vm:
    """A VM of the scenario: KVM's secondary MMU, the vCPU, and the probe."""

    def __init__(self, world: World, name: str, max_level: int = 1) -> None:
        self.kvm = Kvm(world.mm, world.trace, world.host, name=name)
        self.kvm.max_level = max_level
        self.kvm.mmio_lookup = lambda gpa: True  # no memslot: KVM leaves it to user space
        self.vcpu = Vcpu(self.kvm, world.host)
        self.kvm.vcpus.append(self.vcpu)
        self.probe = Probe(world.calls, name)
        world.mm.notifiers.register(self.probe)

    def close(self) -> None:
        """Closes VM and vCPU."""
        notifiers = self.probe.subscribed_to
        self.kvm.destroy()
        if notifiers is not None:
            notifiers.unregister(self.probe)

    def page_of(self, gfn: int) -> tuple[str, int] | None:
        """The space and page that a memslot puts behind ``gfn``; None without one."""
        slot = self.kvm.memslots.find(gfn)
        if slot is None:
            return None
        where = _located("", "", slot.hva_of(slot.gfn) + ((gfn - slot.gfn) << PAGE_SHIFT), slot.hva_end)
        return where.space, where.start


class World:
    """A process without mappings. Close it, or use it as a context.

    With ``host`` and ``trace``, which stay the caller's, nothing is observed.
    """

    def __init__(self, host: HostMemory | None = None, trace: Trace | None = None) -> None:
        self._own_host = host is None
        self.host = host or HostMemory(MEMORY, poison="frame")
        self.trace = trace or Trace()
        self.calls: list[Call] = []
        """Notifier calls of the current step."""
        self.events: list[Event] = []
        """What happened in the current step."""
        self.uffd: Userfaultfd | None = None
        """The one that the scenario has opened."""
        self.messages: list[dict[str, Any]] = []
        """What its monitor was told in the current step."""
        self.births: dict[int, int] = {}
        """When each allocated frame was allocated, by pfn."""
        self.allocations = 0
        if trace is None:
            self.trace.attach(self._observe)
        self.mm = Mm(self.host, self.trace, name="host")
        self.thread = HostThread(self.mm, "host")
        self.files: dict[str, PageCache] = {}
        self.children: dict[str, Mm] = {}
        self.vms: dict[str, Vm] = {}
        self.background: Callable[[], None] | None = None
        """What a vCPU that is inside the guest does between any two things that the host does."""
        self.broken = False
        """An invariant of the model does not hold any more."""
        self._resources = ExitStack()
        self._folder: str | None = None

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and gives everything back; a world that is ``broken`` only what is the real host's."""
        self.background = None
        if not self.broken:
            for mm in (self.mm, *self.children.values()):
                mm.exit()
            for file in self.files.values():
                file.close()
        self._resources.close()
        if self._own_host:
            self.host.close()

    @property
    def folder(self) -> str:
        """A folder of the real host for files on disk, gone with the world."""
        if self._folder is None:
            self._folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="xipvm-conform-"))
        return self._folder

    def vm(self, name: str) -> Vm:
        """The VM of that name. Raises MmError ESRCH when making it failed."""
        return _made("VM", self.vms, name)

    def child(self, name: str) -> Mm:
        """The child of that name. Raises MmError ESRCH when the fork failed."""
        return _made("child", self.children, name)

    # ---- observation

    def _observe(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "page_alloc_huge":
            self.allocations += 1
            for first, count in event.fields["pages"]:
                self.births.update(dict.fromkeys(range(first, first + count), self.allocations))
        elif event.kind == "page_alloc":
            self.allocations += 1
            self.births[event.fields["pfn"]] = self.allocations
        elif event.kind == "page_free":
            for first, count in event.fields["pages"]:
                for pfn in range(first, first + count):
                    self.births.pop(pfn, None)

    def begin_step(self) -> int:
        """Forgets what was observed; frames that are allocated from now on are born after the result."""
        self.calls.clear()
        self.events.clear()
        self.messages.clear()
        for vm in self.vms.values():
            vm.vcpu.begin_step()
        return self.allocations

    def frame(self, pfn: int) -> Frame:
        """The frame that has this number now."""
        return Frame(pfn, self.births.get(pfn, 0))

    def alive(self, frame: Frame) -> bool:
        """Whether it has not been freed."""
        return self.births.get(frame.pfn, 0) == frame.born

    def is_anon(self, frame: Frame) -> bool:
        """Whether it is a page of a process, not of a file."""
        return bool(self.host.flags(frame.pfn) & PG_ANON)

    def table(self, space: str) -> Table:
        """The primary page table over ``space``."""
        first = BASE[space] >> PAGE_SHIFT
        cells: Table = {}
        for page, entry in self.mm.pgd.entries(first, first + LIMIT):
            for offset in range(HUGE_PAGES if entry & HUGE else 1):
                cells[page + offset - first] = self._cell(entry, offset)
        return cells

    def _cell(self, entry: int, offset: int) -> Cell:
        if not entry & MAPPED:
            return Cell("swap") if entry & SWAP else Cell("guard") if entry & GUARD else NOTHING
        pfn = pte_pfn(entry)
        if pfn == ZERO_PFN and not entry & HUGE:
            return Cell("zero")
        if entry & HUGE and entry & SPECIAL:
            return Cell("hugezero")
        return Cell("frame", self.frame(pfn + offset))

    def running(self) -> AbstractContextManager[None]:
        """A context in which the vCPU that is inside the guest, if one is, makes progress at every schedule point."""
        if self.background is None:
            return nullcontext()
        inside = False

        def hook(label: str) -> None:
            nonlocal inside
            if inside or self.background is None:
                return
            inside = True
            before = self.trace.actor, self.trace.cause
            self.trace.actor, self.trace.cause = "vcpu0", 0
            try:
                with suppress(_MustWaitError), on_wait(_must_wait):
                    self.background()
            finally:
                self.trace.actor, self.trace.cause = before
                inside = False

        return on_point(hook)

    def __repr__(self) -> str:
        return f"<world of {self.mm!r}, VMs {', '.join(self.vms) or 'none'}>"


def _made(what: str, things: dict[str, T], name: str) -> T:
    found = things.get(name)
    if found is None:
        raise MmError(errno.ESRCH, f"there is no {what} {name}")
    return found


def hva(space: str, page: int) -> int:
    """The address of a page of a space."""
    return BASE[space] + (page << PAGE_SHIFT)


def method(owner: Any, name: str, op: str) -> Any:
    """What is called ``name`` in the model. Raises UnsupportedError: it is not there, so ``op`` cannot be done."""
    found = getattr(owner, name, None)
    if found is None:
        raise UnsupportedError(op)
    return found
