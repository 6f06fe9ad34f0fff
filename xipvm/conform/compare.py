"""Comparing one step with what was recorded: every field of ``expect``.

Frames have names in a scenario. A name stands for one frame as long as that frame is allocated, and two names never
for one frame: :class:`Names` keeps the renaming and says where it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xipvm.address import PAGE_SHIFT
from xipvm.conform.scenario import Step, expand
from xipvm.conform.schema import SPACES
from xipvm.conform.world import NOTHING, Call, Cell, Frame, Table, Vm, World, hva
from xipvm.mmu.secondary.spte import SPTE_HUGE, SPTE_PRESENT, SPTE_WRITE, spte_pfn
from xipvm.trace.events import KINDS, Event, spans
from xipvm.trace.show import format_event

_TOUCHES: Final = ("guest_read", "guest_write", "host_read", "host_write")
_WORDS: Final = ("none", "zero", "hugezero", "swap", "guard")
_PLAIN: Final = ("rc", "errno", "exit", "value", "signal", "faulted", "dirty", "written", "uffd", "wrong")
_EVENTS_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as recorded. ``cause`` says what of the model led to it, as far as is known."""

    field: str
    expected: str
    got: str
    cause: str = ""


@dataclass(slots=True)
class Taken:
    """One executed step: what it observed, why it failed, and the world around it."""

    step: Step
    observed: dict[str, Any]
    failure: str
    before: dict[str, Table]
    after: dict[str, Table]
    born_after: int
    """Frames of this step were allocated behind this one."""
    calls: list[Call]
    events: list[Event]
    sptes: tuple[dict[int, int], dict[int, int]]
    """Present entries of vm1, before and after."""


@dataclass(slots=True)
class Names:
    """The names of frames so far."""

    world: World
    frames: dict[str, Frame] = field(default_factory=dict)
    names: dict[Frame, str] = field(default_factory=dict)
    began: int = 0
    """How many frames had been allocated when the measured steps began."""

    def start(self, tables: Mapping[str, Table]) -> None:
        """The measured steps begin: anonymous pages are called by the page that they are at."""
        self.began = self.world.allocations
        for letter, space in zip("fa", SPACES, strict=True):
            for page, cell in tables[space].items():
                frame = cell.frame
                if frame is not None and frame not in self.names and self.world.is_anon(frame):
                    self._bind(f"{letter}{page}", frame)

    def agree(self, name: str, frame: Frame, *, again: bool = False) -> bool:
        """Whether ``frame`` can be the one called ``name``; from then on it is. ``again``: whichever it was before."""
        bound = self.frames.get(name)
        if bound == frame:
            return True
        called = self.names.get(frame)
        if called is not None and not again:
            return False
        if bound is not None and not again and self.world.alive(bound):
            return False
        self._bind(name, frame)
        return True

    def unseen(self, frame: Frame) -> bool:
        """Whether ``frame`` was allocated in a measured step, and nothing has been said of it."""
        return frame.born > self.began and frame not in self.names

    def _bind(self, name: str, frame: Frame) -> None:
        self.names.pop(self.frames.get(name, frame), None)
        self.frames.pop(self.names.get(frame, name), None)
        self.frames[name] = frame
        self.names[frame] = name

    def name(self, cell: Cell) -> str:
        """What ``cell`` holds, for a person."""
        if cell.frame is None:
            return cell.word
        called = self.names.get(cell.frame)
        return f"{called} (pfn {cell.frame.pfn:#x})" if called else f"pfn {cell.frame.pfn:#x}"


def compare(world: World, names: Names, taken: Taken) -> list[Difference]:
    """Where ``taken`` is not what its step expects."""
    expect = taken.step.expect
    found = []
    for name in _PLAIN:
        if name in expect and taken.observed.get(name) != expect[name]:
            found.append(_plain(world, taken, name))
    if "notifier" in expect:
        found += _notifier(taken)
    if "primary" in expect:
        found += _primary(world, names, taken)
    if "spte" in expect:
        found += _spte(world, names, taken)
    return found


def _plain(world: World, taken: Taken, name: str) -> Difference:
    cause = taken.failure
    if not cause and taken.observed.get("exit") == "efault":
        cause = _vm(world, taken).kvm.last_error
    if not cause and "gfn" in taken.step.args:
        cause = _about(taken, gfn=taken.step.args["gfn"])
    got = taken.observed.get(name)
    return Difference(name, show(taken.step.expect[name]), "nothing" if got is None else show(got), cause)


def show(value: Any) -> str:
    """A value as a person reads it."""
    return value if isinstance(value, str) else repr(value)


def _vm(world: World, taken: Taken) -> Vm:
    return world.vm(taken.step.args.get("vm", "vm1"))


def _about(taken: Taken, *, page: int | None = None, gfn: int | None = None) -> str:
    """The last events of the step that name a host page number or a guest frame."""
    lines = []
    for event in taken.events:
        for space, first, end in spans(KINDS[event.kind], event.fields):
            at = {"hva": page, "gfn": gfn}.get(space)
            if at is not None and first <= at < end:
                lines.append(_line(event))
                break
    return "; ".join(lines[-_EVENTS_SHOWN:]) or "nothing of this step names it"


def _line(event: Event) -> str:
    """An event without its time."""
    return " ".join(format_event(event).split()[1:])


# ---- notifier calls


def _notifier(taken: Taken) -> Iterator[Difference]:
    expected = [
        Call(call["call"], call.get("event", ""), call.get("space", ""), call.get("start", 0), call.get("end", 0))
        for call in expand(taken.step.expect["notifier"])
    ]
    problem = (_overlapping if taken.step.expect.get("notifier_order") == "overlap" else _in_order)(
        expected, taken.calls
    )
    if problem:
        yield Difference("notifier", _calls(expected), _calls(taken.calls), f"{problem}{_announced(taken)}")


def _calls(calls: list[Call]) -> str:
    return ", ".join(map(str, calls)) or "no call"


def _in_order(expected: list[Call], got: list[Call]) -> str:
    for number, (want, have) in enumerate(zip(expected, got, strict=False), 1):
        if want != have:
            return f"call {number} is {have}"
    if len(got) > len(expected):
        return f"call {len(expected) + 1}, {got[len(expected)]}, is one too many"
    return f"call {len(got) + 1}, {expected[len(got)]}, is missing" if len(got) < len(expected) else ""


def _overlapping(expected: list[Call], got: list[Call]) -> str:
    """Like _in_order, but calls whose ranges do not overlap may change places."""
    left = list(expected)
    for number, have in enumerate(got, 1):
        if have not in left:
            return f"call {number}, {have}, is one too many"
        at = left.index(have)
        for want in left[:at]:
            if _overlap(want, have):
                return f"call {number}, {have}, comes before {want}"
        del left[at]
    return f"{left[0]} is missing" if left else ""


def _overlap(one: Call, other: Call) -> bool:
    if "" in (one.space, other.space) or "mm" in (one.space, other.space):
        return True
    return one.space == other.space and one.start < other.end and other.start < one.end


def _announced(taken: Taken) -> str:
    """Which operations of the model announced something in this step."""
    by_seq = {event.seq: event for event in taken.events}
    causes = []
    for event in taken.events:
        if event.kind == "mmu_notifier_invalidate_range_start":
            cause = by_seq.get(event.cause)
            causes.append(_line(cause if cause is not None else event))
    return f"; announced by {'; '.join(dict.fromkeys(causes))}" if causes else ""


# ---- the primary page table


def _primary(world: World, names: Names, taken: Taken) -> Iterator[Difference]:
    expected = taken.step.expect["primary"]
    ignored = set(taken.step.expect.get("primary_ignore", ()))
    changed = changes(taken)
    touched = touched_page(world, taken.step)
    for page in sorted({int(page) for page in expected} | set(changed)):
        if str(page) in ignored or (taken.step.op in _TOUCHES and touched is not ANY and page != touched):
            continue
        cells = changed.get(page)
        if str(page) not in expected:
            assert cells is not None
            yield _changed(names, taken, page, "no change", cells)
            continue
        words = expected[str(page)]
        if cells is None:
            yield Difference(
                f"primary of page {page}",
                " -> ".join(words),
                f"stays {names.name(taken.after['slot'].get(page, NOTHING))}",
                _about(taken, page=_page_number(page)),
            )
        elif not all(
            fits(names, word, cell, again=words[0] == "swap") for word, cell in zip(words, cells, strict=True)
        ):
            yield _changed(names, taken, page, " -> ".join(words), cells)


ANY: Final = -1
"""The step touches no single page."""


def touched_page(world: World, step: Step) -> int | None:
    """The page of space ``slot`` that a touch is about; None when it is elsewhere, ANY when there are several."""
    args = step.args
    if "gfn" in args and step.op in ("guest_read", "guest_write"):
        vm = world.vms.get(args.get("vm", "vm1"))
        where = vm.page_of(args["gfn"]) if vm is not None else None
        return where[1] if where is not None and where[0] == "slot" else None
    if "page" in args and step.op in ("host_read", "host_write"):
        page: int = args["page"]
        return page if args["space"] == "slot" else None
    return ANY


def changes(taken: Taken) -> dict[int, tuple[Cell, Cell]]:
    """What changed in the primary page table over space ``slot``."""
    before, after = taken.before["slot"], taken.after["slot"]
    return {
        page: (before.get(page, NOTHING), after.get(page, NOTHING))
        for page in sorted(before.keys() | after.keys())
        if before.get(page, NOTHING) != after.get(page, NOTHING)
    }


def fits(names: Names, word: str, cell: Cell, *, again: bool = False) -> bool:
    """Whether ``cell`` is what a scenario calls ``word``. ``again``: as :meth:`Names.agree`."""
    if word in _WORDS or cell.frame is None:
        return word == cell.word
    return names.agree(word, cell.frame, again=again)


def _changed(names: Names, taken: Taken, page: int, expected: str, cells: tuple[Cell, Cell]) -> Difference:
    return Difference(
        f"primary of page {page}",
        expected,
        " -> ".join(map(names.name, cells)),
        _about(taken, page=_page_number(page)),
    )


def _page_number(page: int) -> int:
    return hva("slot", page) >> PAGE_SHIFT


# ---- the entry of a guest touch


def _spte(world: World, names: Names, taken: Taken) -> Iterator[Difference]:
    gfn, expected = taken.step.args["gfn"], taken.step.expect["spte"]
    if "exit" not in taken.observed:
        yield Difference("spte", show(expected), "nothing", taken.failure)
        return
    vm = _vm(world, taken)
    spte = vm.kvm.sptes.get(gfn)
    if not spte & SPTE_PRESENT:
        yield Difference("spte", show(expected), str(vm.kvm.describe(gfn)), _about(taken, gfn=gfn))
        return
    perm, level = "rw" if spte & SPTE_WRITE else "r", 2 if spte & SPTE_HUGE else 1
    frame = world.frame(spte_pfn(spte))
    where = vm.page_of(gfn)
    space, page = where if where is not None else ("slot", gfn)
    if level == 2:
        page -= gfn & 511
    cells = taken.before.get(space, {}).get(page, NOTHING), taken.after.get(space, {}).get(page, NOTHING)
    shown = names.name(Cell("frame", frame)) if cells[1].frame is not None else cells[1].word
    for what, want, got in (("perm", expected["perm"], perm), ("level", expected["level"], level)):
        if want != got:
            yield Difference(f"spte {what}", show(want), show(got), _about(taken, gfn=gfn))
    kind = expected["frame_is"]
    # Where the primary page table was not recorded a frame of an earlier step is new when the guest first gets it.
    late = kind == "new" and "primary" not in taken.step.expect and names.unseen(frame) and cells[1].frame == frame
    if not late and not _KINDS[kind](world, frame, cells, taken.born_after):
        yield Difference("spte frame_is", kind, shown, _about(taken, gfn=gfn))
    elif cells[1].frame is not None and not names.agree(expected["frame"], frame, again=kind == "swapin"):
        yield Difference("spte frame", expected["frame"], shown, _about(taken, gfn=gfn))


_Cells = tuple[Cell, Cell]


def _is_same(world: World, frame: Frame, cells: _Cells, born_after: int) -> bool:
    return cells[0].frame == frame


def _is_new(world: World, frame: Frame, cells: _Cells, born_after: int) -> bool:
    if cells[1].frame != frame or cells[0].frame == frame:
        return False
    return frame.born > born_after or not world.is_anon(frame)


def _is_cache(world: World, frame: Frame, cells: _Cells, born_after: int) -> bool:
    return cells[1].frame == frame and cells[0].frame != frame and not world.is_anon(frame)


def _is_zero(world: World, frame: Frame, cells: _Cells, born_after: int) -> bool:
    return cells[1].word == "zero" and frame.pfn == 0


def _is_hugezero(world: World, frame: Frame, cells: _Cells, born_after: int) -> bool:
    return cells[1].word == "hugezero"


def _is_swapped_in(world: World, frame: Frame, cells: _Cells, born_after: int) -> bool:
    return cells[1].frame == frame and cells[0].frame != frame


_KINDS: Final[dict[str, Callable[[World, Frame, _Cells, int], bool]]] = {
    "same": _is_same,
    "new": _is_new,
    "cache": _is_cache,
    "zero": _is_zero,
    "hugezero": _is_hugezero,
    "swapin": _is_swapped_in,
}
