"""The host takes, moves, protects and copies the memory of a guest that runs, and the guest does not notice.

What is done to the guest's pages keeps their contents, so whatever goes wrong in the guest is a stale translation,
stale code or a lost page. Frames that were freed are given to somebody else at once, who writes over them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from tests.run.command import ISAS, guest
from xipvm import Console, Event, Machine, Mm, Trace
from xipvm.actors import on_point
from xipvm.address import Gfn
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.pte import PRESENT, WRITE, pte_pfn
from xipvm.mmu.secondary.spte import SPTE_PRESENT, SPTE_WRITE, describe_spte, spte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import PROT_EXEC, PROT_READ, PROT_WRITE

PAGE = 4096
MIB = 1 << 20
RX = PROT_READ | PROT_EXEC
RWX = RX | PROT_WRITE


@dataclass
class Oracle:
    """A sink that keeps what each vCPU may still use, and fails when a frame is freed that one of them may."""

    tlbs: dict[int, set[int]] = field(default_factory=dict)
    sptes: dict[int, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    freed: int = 0

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        fields = event.fields
        if event.kind == "tlb_insert":
            self.tlbs.setdefault(fields["vcpu"], set()).add(fields["pfn"])
        elif event.kind == "tlb_flush":
            self.tlbs.pop(fields["vcpu"], None)
        elif event.kind == "spte_set":
            self.sptes[fields["gfn"]] = fields["pfn"]
        elif event.kind == "spte_zap":
            self.sptes = {gfn: pfn for gfn, pfn in self.sptes.items() if not fields["start"] <= gfn < fields["end"]}
        elif event.kind == "page_free":
            frames = {first + n for first, count in fields["pages"] for n in range(count)}
            self.freed += len(frames)
            mapped = frames & set(self.sptes.values())
            assert not mapped, f"#{event.seq} frees frames {sorted(mapped)[:4]}, which have shadow entries"
            for vcpu, inserted in self.tlbs.items():
                known = frames & inserted
                assert not known, (
                    f"#{event.seq} frees frames {sorted(known)[:4]}, which vCPU {vcpu} may have in its TLB"
                )

    def ranges(self) -> list[tuple[Event, list[Event]]]:
        """Each range start, with what follows it up to the start of the next one."""
        found: list[tuple[Event, list[Event]]] = []
        for event in self.events:
            if event.kind == "mmu_notifier_invalidate_range_start":
                found.append((event, []))
            elif found:
                found[-1][1].append(event)
        return found


class World:
    """A machine in the middle of a run, and what the host does to it."""

    def __init__(self, name: str, isa: str, *, memory: int = 32 * MIB, smp: int = 1, protocol: str = "modern") -> None:
        self.oracle = Oracle()
        self.output = io.BytesIO()
        self.trace = Trace()
        self.trace.attach(self.oracle)
        self.machine = Machine(
            guest=guest(name, isa), memory=memory, smp=smp, trace=self.trace, console=Console(self.output),
            protocol=protocol,
        )  # fmt: skip
        self.mm = self.machine.mm
        self.ram = int(self.machine.ram)
        self.random = Random(name + isa)
        self.thief = self.mm.fork("thief")
        """Somebody else on the same host, who takes every frame that is freed."""
        self.thief.munmap(self.ram, memory)
        self.loot = int(self.thief.mmap(64 * PAGE, PROT_READ | PROT_WRITE))
        self.thread = HostThread(self.mm, "monitor")
        self.done = 0
        self.children: list[tuple[Mm, list[tuple[int, bytes]]]] = []
        """Those that were kept, with pages of theirs as they were."""

    def pages(self) -> list[int]:
        """Addresses of the guest's pages that have a frame, ascending."""
        first, end = self.ram >> 12, (self.ram + self.machine.memory_size) >> 12
        return [page << 12 for page, _ in self.mm.pgd.entries(first, end)]

    def some(self, most: int = 8) -> list[int]:
        """A few of them."""
        pages = self.pages()
        return self.random.sample(pages, min(len(pages), self.random.randint(1, most)))

    def steal(self, count: int) -> None:
        """Let the thief have frames, write over them, and give the last ones back."""
        self.thief.write(self.loot, b"\xa5" * PAGE * min(count, 64))
        self.thief.madvise(self.loot, 64 * PAGE, MADV_DONTNEED)

    # What the host does. Each keeps what the guest can read.

    def move(self) -> None:
        """Takes pages away and gives them back in other frames."""
        taken = [(hva, self.mm.read(hva, PAGE)) for hva in self.some()]
        for hva, _ in taken:
            self.mm.madvise(hva, PAGE, MADV_DONTNEED)
        self.steal(len(taken))
        for hva, data in taken:
            self.mm.write(hva, data)

    def protect(self) -> None:
        """Takes the right to write away and gives it back, also to a page in the middle of others."""
        hva = self.random.choice(self.pages())
        size = self.random.choice((1, 3, 64)) * PAGE
        size = min(size, self.ram + self.machine.memory_size - hva)
        self.mm.mprotect(hva, size, RX)
        self.check()
        self.mm.mprotect(hva, size, RWX)

    def fork(self) -> None:
        """A child that goes away at once."""
        child = self.mm.fork()
        self.check()
        child.exit()

    def fork_and_keep(self) -> None:
        """A child whose pages must stay what they were: the guest writes to copies until it has gone."""
        if len(self.children) == 2:
            child, seen = self.children.pop(0)
            for hva, data in seen:
                assert child.read(hva, PAGE) == data, "the guest wrote to its child"
            child.exit()
        child = self.mm.fork()
        self.children.append((child, [(hva, child.read(hva, PAGE)) for hva in self.some()]))

    def rewrite(self) -> None:
        """Writes what is there, by the kernel's copy and by a thread."""
        for hva in self.some():
            self.mm.write(hva, self.mm.read(hva, PAGE))
            self.thread.store(hva + 8, self.thread.load(hva + 8, 64))

    def drop_flash(self) -> None:
        """Takes the pages of the flash banks away, which come back by faults."""
        for memory in self.machine.flash:
            self.mm.madvise(memory.hva, memory.bank.size, MADV_DONTNEED)

    def drop_unused(self) -> None:
        """Uses and drops pages that the guest never needs."""
        hva = self.ram + self.machine.memory_size - 4 * PAGE
        self.mm.write(hva, b"\x5a" * 4 * PAGE)
        self.mm.madvise(hva, 4 * PAGE, MADV_DONTNEED)

    OPERATIONS: tuple[Callable[..., None], ...] = (move, protect, fork, fork_and_keep, rewrite, drop_flash, drop_unused)

    def meddle(self) -> None:
        """One of them."""
        operation: Callable[[World], None] = self.random.choice(self.OPERATIONS)
        self.trace.actor = "host"
        operation(self)
        self.done += 1

    def check(self) -> None:
        """Every shadow entry says what the host's entry says."""
        secondary = self.machine.secondary
        for gfn, spte in secondary.sptes.entries(0, 1 << 27):
            if not spte & SPTE_PRESENT:
                continue
            slot = secondary.memslots.find(gfn)
            assert slot is not None
            pte = self.mm.pgd.get(slot.hva_of(Gfn(gfn)) >> 12)
            what = f"gfn {gfn:#x}: {describe_spte(spte)}"
            assert pte & PRESENT, f"{what}, but the host has no page"
            assert pte_pfn(pte) == spte_pfn(spte), f"{what}, but the host has pfn {pte_pfn(pte):#x}"
            assert not spte & SPTE_WRITE or pte & WRITE, f"{what}, but the host may not write"

    def run(self, slice_: int, operations: int) -> int:
        """Run the guest to its end; before each slice, as long as there are ``operations``, meddle. The status."""
        result = self.machine.run(max_instructions=slice_)
        while result.reason == "limit":
            if operations > self.done:
                self.meddle()
                self.check()
                if self.done % 20 == 0:
                    verify(self.machine.host)
                result = self.machine.run(max_instructions=slice_)
            else:
                result = self.machine.run()
        self.check()
        verify(self.machine.host)
        assert result.reason == "exit", result.report
        return result.status

    def run_meddled(self, where: str, every: int, last: str) -> None:
        """The whole run, meddled with at every so many of the points ``where``; it ends well, and says ``last``."""
        seen = 0
        busy = False

        def at_point(label: str) -> None:
            nonlocal seen, busy
            if label != where or busy:
                return
            seen += 1
            if seen % every == 0 and self.done < 60:
                actor, busy = self.trace.actor, True
                self.meddle()
                self.check()
                self.trace.actor, busy = actor, False

        with on_point(at_point):
            result = self.machine.run(max_instructions=50_000_000)
        assert (result.status, result.reason) == (0, "exit"), result.report
        assert self.last_line() == last
        self.check()
        verify(self.machine.host)
        assert self.done > 5

    def close(self) -> None:
        """End it. The vCPUs go first then, without flushing anything."""
        self.trace.detach(self.oracle)
        for child, _ in self.children:
            child.exit()
        self.thief.exit()
        self.machine.close()

    def last_line(self) -> str:
        """The last line that the guest printed."""
        return self.output.getvalue().decode().replace("\r\n", "\n").splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "smp", "slice_", "operations", "last"),
    [
        ("pages", 1, 5_003, 60, "pages: 0 wrong"),
        ("sort", 1, 500_009, 60, "sort: 0 ok"),
        ("crc", 1, 3_000_017, 40, "crc: 60318e4e ok"),
        ("selfmod", 1, 61, 100, "selfmod: ok"),
        ("reprogram", 1, 97, 100, "reprogram: ok"),
        ("token", 2, 53, 60, "token: 2 cpus, 200 passes, sum 19900 ok"),
        ("selfmod-smp", 2, 101, 60, "selfmod-smp: ok"),
        ("user", 1, 41, 60, "user: ok"),
    ],
)
def test_between_slices(name: str, smp: int, slice_: int, operations: int, last: str, isa: str) -> None:
    world = World(name, isa, smp=smp)
    try:
        assert world.run(slice_, operations) == 0
        assert world.last_line() == last
        assert world.done > 30
        assert world.oracle.freed > 20
    finally:
        world.close()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "smp", "every", "last"),
    [
        ("pages", 1, 97, "pages: 0 wrong"),
        ("selfmod", 1, 1, "selfmod: ok"),
        ("reprogram", 1, 3, "reprogram: ok"),
        ("token", 2, 1, "token: 2 cpus, 200 passes, sum 19900 ok"),
    ],
)
@pytest.mark.parametrize("where", ["kvm.fault.seq_read", "kvm.fault.gup_done"])
def test_in_the_middle_of_the_guest_s_own_faults(
    name: str, smp: int, every: int, last: str, where: str, isa: str
) -> None:
    """From inside the engine's hook: the fault that is under way has to start over when its page was taken."""
    world = World(name, isa, smp=smp)
    try:
        world.run_meddled(where, every, last)
    finally:
        world.close()
    if where == "kvm.fault.gup_done":
        assert any(event.kind == "kvm_retry" for event in world.oracle.events)


ZAPPED = ["spte_zap", "tlb_flush", "pte_clear", "mmu_notifier_invalidate_range_end", "primary_tlb_flush", "page_free"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("smp", [1, 2])
def test_the_order_of_every_range(isa: str, smp: int) -> None:
    """What the guest has used is flushed everywhere before the host's entry goes, and freed last of all."""
    world = World("token", isa, smp=smp)
    try:
        result = world.machine.run(max_instructions=1500)
        ranges = everywhere = 0
        while result.reason == "limit":
            world.move()
            world.check()
            result = world.machine.run(max_instructions=1500)
        assert result.status == 0
        used: set[int] = set()
        """vCPUs that have filled their TLB since it was flushed. Requests to flush one that are pending are one."""
        for start, following in world.oracle.ranges():
            before = set(used)
            for event in following:
                if event.kind == "tlb_insert":
                    used.add(event.fields["vcpu"])
                elif event.kind == "tlb_flush":
                    used.discard(event.fields["vcpu"])
            kinds = [event.kind for event in following if event.kind in ZAPPED]
            if start.fields["mm"] != world.mm.name or start.fields["event"] != "CLEAR" or "spte_zap" not in kinds:
                continue
            inside = following[: [event.kind for event in following].index("pte_clear")]
            flushed = [event.fields["vcpu"] for event in inside if event.kind == "tlb_flush"]
            assert flushed == sorted(before | set(flushed)), following
            ranges += 1
            everywhere += len(flushed) == smp
            order = list(dict.fromkeys(kinds))
            if flushed:
                assert order[: len(ZAPPED)] == ZAPPED, following
            else:
                assert [kind for kind in order if kind != "tlb_flush"] == ZAPPED[:1] + ZAPPED[2:], following
            zap = next(event for event in following if event.kind == "spte_zap")
            clear = next(event for event in following if event.kind == "pte_clear")
            free = next(event for event in following if event.kind == "page_free")
            assert zap.fields["pages"] == clear.fields["pages"] == free.fields["pages"]
        assert ranges > 3
        assert everywhere > 1
    finally:
        world.close()
