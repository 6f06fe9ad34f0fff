"""A scene: the host, its address spaces, secondary MMUs and actors of one scenario, made anew for every run.

A scenario is a function that furnishes a scene::

    @scenario
    def fault_against_munmap(scene: Scene) -> None:
        mm = scene.mm()
        ram = mm.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE)
        vcpu = scene.vcpu(scene.kvm(mm, ram, pages=1))
        scene.actor("vcpu0", vcpu.store, 0, b"x")
        scene.actor("host", mm.munmap, ram, PAGE_SIZE)

What it does itself happens before the actors run, and in order. At the end, when all actors are done, whatever
``scene.afterwards`` was given is called, then the scene checks what has to hold in any case: no range is open, no
count is left up, references and reverse map agree with a full scan, every shadow entry is the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from xipvm import locks
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.check import INVARIANTS, Oracle, Violation, reader_of
from xipvm.check.explain import POISON, belongs
from xipvm.console import Console
from xipvm.errors import XipvmError
from xipvm.explore.choices import Question, Recording
from xipvm.explore.fingerprint import Fingerprint
from xipvm.explore.scripted import GuestAccessError, ScriptedVcpu
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import PRESENT, pte_pfn
from xipvm.mmu.secondary.at_rest import difference
from xipvm.mmu.secondary.base import SecondaryMmu
from xipvm.mmu.secondary.gru import GruBase
from xipvm.mmu.secondary.gru_2008 import gru_of
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.swap import close_swap
from xipvm.mmu.verify import verify
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace

if TYPE_CHECKING:
    from xipvm.machine import Machine
    from xipvm.machine_actors import VcpuActors

POISONED: Final = bytes([POISON]) * PAGE_SIZE
"""What a frame holds that is free."""
HOST_MEMORY: Final = 1 << 20
"""Of a scene, bytes; frames are poisoned as a whole."""


AnyMmu = TypeVar("AnyMmu", bound=SecondaryMmu)


class BrokenError(XipvmError):
    """The oracle found ``violation``."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(f"{violation.invariant}: {violation.message}")
        self.violation = violation


class Scene:
    """What one run is made of. ``recording`` answers every question; close it, or use :meth:`open`."""

    def __init__(
        self,
        recording: Recording,
        *,
        protocol: str = "modern",
        host_memory: int = HOST_MEMORY,
        invariants: Collection[str] = tuple(INVARIANTS),
    ) -> None:
        self.protocol = protocol
        self.trace = Trace()
        self.oracle = Oracle(invariants, stop=self._stop)
        self.trace.attach(self.oracle)
        self.host = HostMemory(host_memory, poison="frame")
        self.oracle.reader = reader_of(self.host)
        self.scheduler = Scheduler(self._choose, trace=self.trace)
        self.mms: list[Mm] = []
        self.mmus: list[SecondaryMmu] = []
        self.guest_errors: list[GuestAccessError] = []
        """Accesses that ended their actor."""
        self._recording = recording
        self.guest_may_fail = False
        """A machine's guest may end as it likes."""
        self._machines: list[tuple[Machine, VcpuActors]] = []
        self._afterwards: list[Callable[[], object]] = []
        self._undo: list[Callable[[], object]] = []
        self._stopped = False
        self._ended = False
        self.goes_on = False
        """What the oracle finds does not end the run; what comes of it is in ``aftermath``. Not with machines."""
        self.aftermath: list[str] = []
        self.fingerprint = Fingerprint()
        """What has happened, up to commuting steps."""
        self.trace.attach(self.fingerprint)

    # ---- furniture

    def mm(self) -> Mm:
        """An empty address space of its own, of the protocol that the run is to be in."""
        mm = Mm(self.host, self.trace, name=f"mm{len(self.mms)}", protocol=self.protocol)
        self.mms.append(mm)
        return mm

    def thread(self, mm: Mm) -> HostThread:
        """A thread of the host that runs in ``mm``."""
        return HostThread(mm, f"thread{len(mm.threads)}")

    def kvm(self, mm: Mm, hva: int | None = None, *, pages: int = 1, gfn: int = 0) -> KvmBase:
        """A KVM on ``mm``, with a memslot of ``pages`` at ``gfn`` onto ``hva`` if that is given."""
        kvm = kvm_of(mm, self.trace, self.host, name=f"vm{len(self.mmus)}")
        self.mmus.append(kvm)
        self._undo.append(kvm.destroy)
        if hva is not None:
            kvm.set_memslot(0, gfn, pages, hva)
        return kvm

    def gru(self, mm: Mm, hva: int, *, pages: int = 1, gfn: int = 0) -> GruBase:
        """The GRU of ``mm``, with a memslot of ``pages`` at ``gfn`` onto ``hva``."""
        gru = self.watch(gru_of(mm, self.trace, self.host))
        gru.set_memslot(0, gfn, pages, hva)
        return gru

    def machine(
        self,
        board: str,
        code: bytes = b"",
        *,
        guest: str | None = None,
        memory: int = 4 << 20,
        smp: int = 1,
    ) -> Machine:
        """A machine whose vCPUs are actors. It begins with ``code``, at the start of flash bank 0; or it is ``guest``.

        Unless ``guest_may_fail``, the guest has to end with status 0.
        """
        from xipvm.machine import Machine
        from xipvm.machine_actors import VcpuActors

        machine = Machine(
            guest, board=board, memory=memory, smp=smp, trace=self.trace, protocol=self.protocol, console=Console()
        )
        self._undo.append(machine.close)
        if code:
            machine.flash[0].device.place(0, code)
        self.oracle.reader = reader_of(machine.host)
        self._machines.append((machine, VcpuActors(machine, self.scheduler)))
        return machine

    def watch(self, mmu: AnyMmu) -> AnyMmu:
        """Check a secondary MMU of the scenario's own at the end, and destroy it. Returns it."""
        self.mmus.append(mmu)
        self._undo.append(mmu.destroy)
        return mmu

    def vcpu(self, mmu: SecondaryMmu) -> ScriptedVcpu:
        """A vCPU without code: its accesses are calls."""
        index = sum(len(other.vcpus) for other in self.mmus)
        vcpu = ScriptedVcpu(mmu.port(len(mmu.vcpus)), self.host, self.trace, index)
        vcpu.heard = self._accessed if self.goes_on else None
        mmu.vcpus.append(vcpu)
        return vcpu

    def actor(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        """Somebody who runs beside the others: calls ``function(*arguments)``.

        An access to memory that is not there ends it, as it would a guest; ``guest_errors`` has it then.
        """
        self.scheduler.spawn(name, self._live, function, arguments).body = (function, *arguments)

    def _live(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except GuestAccessError as error:
            self.guest_errors.append(error)

    def afterwards(self, function: Callable[[], object]) -> None:
        """Call ``function`` when all actors are done; what it raises is the run's failure."""
        self._afterwards.append(function)

    def undo(self, function: Callable[[], object]) -> None:
        """Call ``function`` when the scene is closed, last first."""
        self._undo.append(function)

    def choose(self, n: int, label: str) -> int:
        """A number below ``n``, as the search wants it: a victim, a moment, a size."""
        return self._recording.ask(Question(n, label)) if n > 1 else 0

    @property
    def asked(self) -> int:
        """How many choices the search has made so far."""
        return len(self._recording.choices)

    # ---- its run

    def run(self) -> None:
        """Run the actors to their end and check. Raises whatever is wrong: BrokenError, XipvmError, AssertionError.

        Does nothing when the oracle has found something before.
        """
        if self._stopped:
            return
        with locks.checking():
            self.scheduler.run()
        for function in self._afterwards:
            function()
        self.oracle.finish()
        verify(self.host)
        for machine, vcpus in self._machines:
            verify(machine.host)
            check_mmu(machine.secondary)
            if not self.guest_may_fail and vcpus.exit != (0, "exit"):
                raise AssertionError(f"the guest did not end with status 0: {vcpus.exit}")
        for mmu in self.mmus:
            check_mmu(mmu)
        self._ended = True

    def close(self) -> None:
        """Give everything back; nothing is judged any more. What was left broken may resist, and is left then."""
        broken, self._stopped = not self._ended, True
        self.trace.detach(self.oracle)
        for undo in (*reversed(self._undo), *(mm.exit for mm in self.mms)):
            try:
                undo()
            except XipvmError:
                if not broken:
                    raise
        close_swap(self.host)
        self.host.close()

    def _choose(self, n: int, label: str) -> int:
        scheduler = self.scheduler
        candidates = scheduler.candidates
        preempts = candidates[0] is scheduler.running and not candidates[0].waits_for
        names = tuple(actor.name for actor in candidates)
        return self._recording.ask(Question(n, label, preempts, names))

    def _stop(self, violation: Violation) -> None:
        if not self._stopped:
            self._stopped = True
            if not self.goes_on or self._machines:
                raise BrokenError(violation)

    def _accessed(self, vcpu: ScriptedVcpu, gfn: int, pfn: int, data: bytes, write: bool) -> None:
        """Behind the first violation: keeps who accesses a page that the host has taken away."""
        if not self._stopped or self._ended or holds(vcpu.mmu, gfn, pfn):
            return
        what = f"{'writes' if write else 'reads'} {data.hex(' ')}{' (poison)' if data == POISONED[: len(data)] else ''}"
        whose = belongs(self.oracle, pfn)
        self.aftermath.append(f"vcpu{vcpu.index} {what} at guest frame {gfn:#x}, in frame {pfn:#x}, which {whose}")


def holds(mmu: SecondaryMmu, gfn: int, pfn: int) -> bool:
    """Whether the host has frame ``pfn`` behind guest frame ``gfn``."""
    entries = (mmu.mm.pgd.pte(hva >> PAGE_SHIFT) for page, hva in mmu.backing() if page == gfn)
    return any(entry & PRESENT and pte_pfn(entry) == pfn for entry in entries)


def check_mmu(mmu: SecondaryMmu) -> None:
    """At rest: no invalidation is counted, and every entry is the host's. Raises AssertionError."""
    if isinstance(mmu, KvmBase):
        counts = mmu.mmu_invalidate_in_progress, mmu.mn_active_invalidate_count
        if counts != (0, 0) and not mmu.mm.dead:  # the release can come between a start and its end
            raise AssertionError(f"{mmu.name} is left with {counts[0]} invalidations in progress, {counts[1]} active")
    if isinstance(mmu, GruBase) and mmu.range_active and not mmu.released:
        raise AssertionError(f"{mmu.name} is left with {mmu.range_active} ranges active")
    what = difference(mmu)
    if what:
        raise AssertionError(what)


Furnish = Callable[[Scene], object]


@dataclass(frozen=True)
class Scenario:
    """A scenario by its name; calling it furnishes a scene."""

    name: str
    furnish: Furnish
    doc: str = ""
    protocols: tuple[str, ...] = ("modern", "2008")
    """The notifier protocols in which all of it exists."""
    host_memory: int = HOST_MEMORY
    """Of its scenes, bytes."""

    def __call__(self, scene: Scene) -> None:
        """Furnish ``scene``."""
        self.furnish(scene)


@overload
def scenario(function: Furnish) -> Scenario: ...
@overload
def scenario(*, protocols: tuple[str, ...] = ..., host_memory: int = ...) -> Callable[[Furnish], Scenario]: ...
def scenario(
    function: Furnish | None = None,
    *,
    protocols: tuple[str, ...] = ("modern", "2008"),
    host_memory: int = HOST_MEMORY,
) -> Scenario | Callable[[Furnish], Scenario]:
    """Decorates the function that furnishes a scene; ``protocols``: those in which all that it does exists."""

    def declare(function: Furnish) -> Scenario:
        name = getattr(function, "__name__", "scenario").replace("_", "-")
        doc = (function.__doc__ or "").strip().partition("\n")[0]
        return Scenario(name, function, doc, protocols, host_memory)

    return declare if function is None else declare(function)


@contextmanager
def opened(scenario: Furnish, recording: Recording, **options: Any) -> Iterator[Scene]:
    """A furnished scene, closed at the end."""
    if isinstance(scenario, Scenario):
        options = {"host_memory": scenario.host_memory} | options
    scene = Scene(recording, **options)
    try:
        scenario(scene)
        yield scene
    finally:
        scene.close()
