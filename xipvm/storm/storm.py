"""Random mm operations under a running guest, which must not change what the guest computes.

A storm acts at two kinds of moments, both of which follow from the guest's inputs and the seed alone:

* **between two instructions** of whichever vCPU runs, at instants of virtual time. The slice that it interrupts goes on
  afterwards as if nothing had been: turns, quanta, timers and interrupts are those of the calm run;
* **inside of other operations**, the guest's own faults among them, at schedule points, as another CPU would. There it
  stands on the stack of what it interrupts, so what it would have to wait for cannot come: it gets EDEADLK, and the
  operation is not done this time. Operations of the storm are interrupted by others the same way, ``DEPTH`` deep.

How far one instant is from the next, and how many points are passed by, is chosen anew each time, below a bound that
grows at the beginning: short guests get their share, too.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from xipvm.actors import on_point, on_wait
from xipvm.errors import BadInput, DeadlockError, MmError, OutOfFrames, ProtocolUnsupported
from xipvm.storm.choices import Choices
from xipvm.storm.devices import DEVICE_OPERATIONS
from xipvm.storm.operations import OPERATIONS, Operation
from xipvm.storm.world import World

if TYPE_CHECKING:
    from xipvm.machine import Machine
    from xipvm.mmu.secondary.base import SecondaryMmu

RATE: Final = 10
"""Operations in a million instructions."""
MAX_RATE: Final = 100_000
DEPTH: Final = 2
GROUPS: Final = {"all": OPERATIONS, "devices": DEVICE_OPERATIONS}
"""Names that stand for many operations."""
_MILLION: Final = 1_000_000
_POINTS: Final = 10_000
"""Points that pass by for an operation at one of them, times the rate."""
_FEWEST_POINTS: Final = 8
"""A fault that is disturbed every time would never come to an end."""
_FIRST_GAP: Final = 16
_WIDENING: Final = 8
"""The bound of a gap begins with the one, and grows by this part of what has passed."""
_ALLOWED: Final = frozenset(
    {
        errno.EDEADLK,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ENOMEM,
        errno.ENOENT,
        errno.ECHILD,
        errno.EINVAL,
        errno.EBADF,
    }
)


class Storm:
    """The storm of one machine, to be given to it when it is made.

    ``rate``: operations in a million instructions, about. ``ops``: names of the operations that come, or of groups of
    them; by default ``all``, which is all but those with devices beside the guest.
    Raises BadInput.
    """

    def __init__(self, seed: int, *, rate: int = RATE, ops: Iterable[str] | None = None) -> None:
        if not 0 <= seed < 1 << 64:
            raise BadInput(f"a storm's seed has 64 bits, {seed} has not")
        if not 1 <= rate <= MAX_RATE:
            raise BadInput(f"a storm's rate is 1 to {MAX_RATE} operations in a million instructions, not {rate}")
        self.seed = seed
        self.rate = rate
        known = OPERATIONS | DEVICE_OPERATIONS
        wanted: dict[str, Operation] = {}
        for name in ("all",) if ops is None else ops:
            if name not in known and name not in GROUPS:
                raise BadInput(f"no operation of a storm is called {name!r}; known are {', '.join([*known, *GROUPS])}")
            wanted |= GROUPS.get(name) or {name: known[name]}
        if not wanted:
            raise BadInput("a storm needs an operation")
        self.done: Counter[str] = Counter()
        """Operations that were done, by name."""
        self.refused: Counter[str] = Counter()
        """Operations that could not be done at that moment."""
        self.next = 0
        """The instant of the next operation, ns."""
        self._drawn = [operation for operation in wanted.values() for _ in range(operation.weight)]
        self._choices = Choices(seed)
        self._world: World | None = None
        self._depth = 0
        self._points = 0
        """Points to pass by until the next operation at one."""
        self._passed = 0

    @property
    def operations(self) -> int:
        """How many there were, refused ones included."""
        return self.done.total() + self.refused.total()

    def bind(self, machine: Machine) -> None:
        """Come over ``machine``. Raises BadInput for a storm that had another one."""
        if self._world is not None:
            raise BadInput("a storm is over one machine only")
        self._world = World(machine, self._choices)
        self._wait(0)
        self._pass_by()

    def end(self) -> None:
        """Give back what it holds of the machine. Raises InternalError when a child was not what it should be."""
        if self._world is not None:
            self._world.end()

    def secondaries(self) -> list[SecondaryMmu]:
        """Secondary MMUs that it has put on the guest's mm, beside the machine's own."""
        world = self._world
        if world is None:
            return []
        return ([] if world.guest is None else [world.guest]) + ([] if world.devices is None else world.devices.mmus())

    @contextmanager
    def raging(self) -> Iterator[None]:
        """A context in which operations come at schedule points, too."""
        with on_point(self._at_point), on_wait(_refuse):
            yield

    def run_due(self, now: int) -> None:
        """Do every operation whose instant has come. No guest instruction is under way."""
        while self.next <= now:
            self._perform("instruction")
            self._wait(now)

    # ---- when

    def _gap(self, most: int, passed: int, label: str) -> int:
        return 1 + self._choices.choose(min(most, _FIRST_GAP + passed // _WIDENING), label)

    def _wait(self, now: int) -> None:
        self.next = now + self._gap(2 * _MILLION // self.rate, now, "instructions")

    def _pass_by(self) -> None:
        self._points = self._gap(max(_FEWEST_POINTS, 2 * _POINTS // self.rate), self._passed, "points")
        self._passed += self._points

    def _at_point(self, label: str) -> None:
        if self._depth >= DEPTH:
            return
        self._points -= 1
        if self._points <= 0:
            self._pass_by()
            self._perform(label)

    # ---- what

    def _perform(self, where: str) -> None:
        world = self._world
        assert world is not None
        operation = self._drawn[self._choices.choose(len(self._drawn), "operation")]
        trace = world.mm.trace
        actor, trace.actor = trace.actor, "storm"
        self._depth += 1
        try:
            with trace.because(trace.emit("storm", operation=operation.name, where=where)):
                self._run(operation, world)
        finally:
            self._depth -= 1
            trace.actor = actor

    def _run(self, operation: Operation, world: World) -> None:
        try:
            operation.run(world)
        except OutOfFrames:
            error = errno.ENOMEM
        except ProtocolUnsupported:
            error = errno.EOPNOTSUPP
        except MmError as refusal:
            # While something is away for a moment, the host process and devices may fail to get at it.
            away = world.lowered and refusal.errno in (errno.EFAULT, errno.EPERM)
            if refusal.errno not in _ALLOWED and not away:
                raise
            error = refusal.errno
        else:
            self.done[operation.name] += 1
            return
        self.refused[operation.name] += 1
        if world.mm.trace.on:
            world.mm.trace.emit("storm_refused", operation=operation.name, error=errno.errorcode[error])


def _refuse(what: str, ready: Callable[[], bool]) -> None:
    """Who holds what is waited for is further up the same stack."""
    raise DeadlockError(f"{what}: its holder would have to go on first")


def parse_storm(text: str) -> Storm:
    """The storm that ``SEED[,rate=N][,ops=NAME+NAME...]`` describes. Raises BadInput."""
    seed, *settings = text.split(",")
    rate, ops = RATE, None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "rate":
            rate = _number(value, "rate")
        elif key == "ops":
            ops = value.split("+")
        else:
            raise BadInput(f"{setting!r} is no setting of a storm; there are rate=N and ops=NAME+NAME...")
    return Storm(_number(seed, "seed"), rate=rate, ops=ops)


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise BadInput(f"a storm's {what} is a number, not {text!r}")
    return int(text)
