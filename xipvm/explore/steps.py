"""The steps of a run, and which of them happened before which because they depend on each other.

Every step has an identity: who made it, his how-manieth it is, what it was answered, and the identities of the steps
that it depends on. So it is the same in all runs in which the same led to it, in whatever order; and the identities of
all its steps are the run's Mazurkiewicz trace (:attr:`Trail.trace`): runs that agree in it differ only in the order of
steps that do not depend on each other, and end alike.

Besides what the footprints say, there are the rules of the scheduler. Who waits goes on when something that he looks at
has changed; who has given way, when others have made a step, which is a resource, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable
from typing import Final

from xipvm.actors import Actor, State
from xipvm.explore.closures import reaches_only_watched
from xipvm.explore.fingerprint import Fingerprint
from xipvm.explore.footprint import Footprint, Recorder
from xipvm.scheduler import Scheduler
from xipvm.trace.events import Event

_BITS: Final = 128
_ALL: Final = 1 << 64
_LOOKS: Final = frozenset(
    (
        "kvm_page_fault",
        "spte_lookup",
        "tlb_insert",
        "host_tlb_insert",
        "device_tlb_insert",
        "iotlb_insert",
        "mmu_interval_read_begin",
        "mmu_interval_read_retry",
    )
)
"""Events that change nothing about the pages that they name: in which order two of them come is nobody's business. But
they change what they name besides: a TLB."""
_REMARKS: Final = frozenset(("kvm_retry", "mm_fault", "host_access", "page_request"))
"""Events that say what their actor is about, and that no invariant is about: what it touches is known besides."""


class Step:
    """A step that was made: the ``number``-th, from 1, of actor ``actor``, ``index``-th of the run."""

    __slots__ = ("actor", "clock", "id", "index", "number", "print", "resumed")

    def __init__(self, index: int, actor: int, number: int, print_: Footprint, resumed: int) -> None:
        self.index = index
        self.actor = actor
        self.number = number
        self.print = print_
        self.resumed = resumed
        """The step with which its actor began to wait or gave way, -1 if it did not."""
        self.id = 0
        self.clock: dict[int, int] = {}
        """By actor, how many of its steps happened before this one, itself included."""

    def before(self, other: Step) -> bool:
        """It happened before ``other``, or is it."""
        return other.clock.get(self.actor, 0) >= self.number


class Trail:
    """A watcher of ``scheduler`` and a sink of its trace: the steps of one run so far.

    ``events`` knows which pages an event names; ``events_are_mine``: nobody else tells it of events from now on.

    ``on_step`` is called with each step and the other actors' steps that it is in a race with: that it depends on, and
    not only by way of others. ``on_turn`` is called with the number of who goes on.
    """

    def __init__(
        self,
        recorder: Recorder,
        scheduler: Scheduler,
        events: Fingerprint,
        *,
        events_are_mine: bool = True,
        on_step: Callable[[Step, list[Step]], None] = lambda step, races: None,
        on_turn: Callable[[int], None] = lambda actor: None,
    ) -> None:
        self.steps_made: list[Step] = []
        self.trace = 0
        """Stands for the set of the steps' identities."""
        self.recorder = recorder
        self._scheduler = scheduler
        self._events = events
        self._events_are_mine = events_are_mine
        self._on_step = on_step
        self._on_turn = on_turn
        self._numbers: dict[Actor, int] = {}
        self._known: dict[Actor, bool] = {}
        self._actors = len(scheduler.actors)
        self._answers: list[str] = []
        self._pending: dict[Actor, Footprint] = {}
        """What was looked at to see whether an actor can go on."""
        self._waits: dict[Actor, int] = {}
        """Who waits or has given way, and since which step."""
        self._polite: set[Actor] = set()
        """Who has given way."""
        self._resumed = -1
        self._entered: tuple[Actor, list[Actor]] | None = None
        self._last: dict[int, Step] = {}
        """By actor."""
        self._writer: dict[object, Step] = {}
        self._readers: dict[object, list[Step]] = {}
        self._numbered: dict[Hashable, list[tuple[int, bool, Step]]] = {}
        self._ranges: dict[Hashable, list[tuple[int, int, bool, Step]]] = {}
        self._unknown: Step | None = None
        scheduler.watcher = self
        recorder.pause()

    def number(self, actor: Actor) -> int:
        """Of ``actor``, in the order of spawning."""
        number = self._numbers.get(actor)
        if number is None:
            for at, each in enumerate(self._scheduler.actors):
                self._numbers.setdefault(each, at)
            number = self._numbers[actor]
        return number

    def answered(self, label: str, answer: int) -> None:
        """The step asked for something else than who goes on."""
        self._answers.append(f"{label}={answer}")
        self.recorder.dont_know("it asks the search")

    def __call__(self, event: Event) -> None:
        """A sink: the step touches what ``event`` names."""
        if self._events_are_mine:
            self._events.learn(event)
        if not self.recorder.listens:  # the scene is being closed
            return
        keys, spaces = self._events.resources(event)
        if event.kind in _REMARKS:
            return
        print_ = self.recorder.print
        writes, changes = print_.writes, event.kind not in _LOOKS
        for key in keys:
            if type(key) is tuple:
                if key[0] == "vcpu":
                    writes.add(key)
                else:
                    (writes if changes else print_.reads).add(key)
                    print_.numbers.append((*key, changes))
        for owner in ("thread", "device"):
            if owner in event.fields:
                writes.add((owner, event.fields[owner]))
        for space in spaces:
            if space == event.kind:
                writes.add(("trace", space))
            else:
                print_.ranges.append((space, 0, _ALL, changes))

    # ---- a watcher

    def ready(self, actor: Actor) -> bool:
        """Asks, and remembers what was looked at."""
        recorder = self.recorder
        own, recorder.print = recorder.print, Footprint()
        recorder.go_on()
        try:
            return bool(actor.ready())  # type: ignore[misc]
        finally:
            recorder.pause()
            looked, recorder.print = recorder.print, own
            for each in (actor, *(polite for polite in self._polite if actor in polite.after)):
                _add(self._pending.setdefault(each, Footprint()), looked)

    def steps(self, actor: Actor, running: Actor | None, found: list[Actor]) -> None:
        """Begins a step."""
        me = self.number(actor)
        self._on_turn(me)
        last = self._last.get(me)
        self.recorder.begin(me, 1 if last is None else last.number + 1)
        own = self.recorder.print
        self._resumed = self._waits.pop(actor, -1)
        if actor not in self._known:
            self._known[actor] = actor.body is not None and reaches_only_watched(actor.body)
        if not self._known[actor]:
            self.recorder.dont_know(f"{actor.name} reaches what nobody watches")
        looked = self._pending.pop(actor, None)
        if looked is not None:
            _add(own, looked)
        if actor in self._polite:
            self._polite.discard(actor)
            own.reads.update((("way of", me), self.number(other)) for other in self._scheduler.actors)
            if not actor.after.isdisjoint(found):
                self.recorder.dont_know("everybody has given way")
        for other in self._scheduler.actors:  # its step may be the first since the other one has given way
            if other is not actor:
                new = actor is not running and (actor not in other.ran or actor in other.after)
                (own.writes if new else own.reads).add((("way of", self.number(other)), me))

    def stepped(self, actor: Actor) -> None:
        """Ends it."""
        me = self.number(actor)
        print_ = self.recorder.end(me)
        if len(self._scheduler.actors) != self._actors:
            self._actors = len(self._scheduler.actors)
            print_.unknown = True
        step = Step(len(self.steps_made), me, 1, print_, self._resumed)
        if actor.gives_way:
            self._polite.add(actor)
            print_.writes.update((("way of", me), self.number(other)) for other in self._scheduler.actors)
        if actor.gives_way or actor.state is State.WAITING:
            self._waits[actor] = step.index
        races = self._place(step)
        self._answers = []
        self.steps_made.append(step)
        self._on_step(step, races)

    # ---- what happened before what

    def _place(self, step: Step) -> list[Step]:
        """Finds what ``step`` depends on; the races."""
        before = self._depends(step)
        last = self._last.get(step.actor)
        if last is not None:
            step.number = last.number + 1
            before[last.index] = last
        clock = step.clock
        for each in before.values():
            for actor, number in each.clock.items():
                if clock.get(actor, 0) < number:
                    clock[actor] = number
        clock[step.actor] = step.number
        name = f"{step.actor} {step.number} {self._answers} {sorted(each.id for each in before.values())}"
        step.id = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=_BITS // 8).digest(), "little")
        self.trace = (self.trace + step.id) % (1 << _BITS)
        self._last[step.actor] = step
        races = {
            each.index: each
            for each in before.values()
            if each.actor != step.actor
            and not any(each is not other and each.before(other) for other in before.values())
        }
        if step.resumed >= 0:
            for each in self.steps_made[step.resumed + 1 :]:
                if each.actor != step.actor and each.print.conflicts(step.print):
                    races[each.index] = each
        return list(races.values())

    def _depends(self, step: Step) -> dict[int, Step]:
        found: dict[int, Step] = {}
        print_ = step.print
        if print_.unknown:
            found.update((each.index, each) for each in self._last.values())
        if self._unknown is not None:
            found[self._unknown.index] = self._unknown
        for key in print_.reads:
            writer = self._writer.get(key)
            if writer is not None:
                found[writer.index] = writer
        for key in print_.writes:
            writer = self._writer.get(key)
            if writer is not None:
                found[writer.index] = writer
            for reader in self._readers.pop(key, ()):
                found[reader.index] = reader
        if self._ranges:
            for owner, number, write in print_.numbers:
                for first, end, wrote, other in self._ranges.get(owner, ()):
                    if (write or wrote) and first <= number < end:
                        found[other.index] = other
        for owner, first, end, write in print_.ranges:
            for number, wrote, other in self._numbered.get(owner, ()):
                if (write or wrote) and first <= number < end:
                    found[other.index] = other
            for start, stop, wrote, other in self._ranges.get(owner, ()):
                if (write or wrote) and first < stop and start < end:
                    found[other.index] = other
        found.pop(step.index, None)
        self._remember(step)
        return found

    def _remember(self, step: Step) -> None:
        print_ = step.print
        for key in print_.writes:
            self._writer[key] = step
        for key in print_.reads - print_.writes:
            self._readers.setdefault(key, []).append(step)
        for owner, number, write in print_.numbers:
            self._numbered.setdefault(owner, []).append((number, write, step))
        for owner, first, end, write in print_.ranges:
            self._ranges.setdefault(owner, []).append((first, end, write, step))
        if print_.unknown:
            self._unknown = step


def _add(to: Footprint, what: Footprint) -> None:
    to.numbers += what.numbers
    to.reads |= what.reads
    to.writes |= what.writes
    to.ranges += what.ranges
    to.unknown |= what.unknown


def first_of(steps: Iterable[Step]) -> list[int]:
    """Who could begin with ``steps``: the actors whose first step of these no other one of them happened before."""
    seen: list[Step] = []
    found: list[int] = []
    for step in steps:
        if step.actor not in found and not any(each.before(step) for each in seen):
            found.append(step.actor)
        seen.append(step)
    return found
