"""What KVM's selftests assert of dirty logs, ageing and shared pages, with a guest that runs.

dirty_log_test, dirty_log_page_splitting_test, access_tracking_perf_test, mmu_stress_test, xen_shinfo_test,
page_fault_test.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.asm import a64
from tests.kvm.running import CTRL, PAGE, RAM, REGION, RWX, Code, Running, running, start_others
from xipvm.actors import on_point
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.secondary.kvm_dirty import INITIALLY_SET, MANUAL_PROTECT_ENABLE, dirty_runs
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from xipvm.mmu.secondary.spte import SPTE_HUGE
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ

DIRTIED = 64
"""Pages that the guest of the dirty log tests writes to, at random."""


def dirtying(cpus: int = 1) -> Code:
    """Puts what is in CTRL into one page of REGION after the other, chosen by a generator of its own, for ever."""
    code = start_others(Code(), cpus, "entry") if cpus > 1 else Code()
    code.add(a64.movz(0, 0))
    code.label("entry").add(a64.add(5, 0, 7), a64.mov(20, REGION), a64.mov(21, CTRL), a64.mov(12, 0x19660D))
    code.label("again").add(a64.madd(5, 5, 12, 12), a64.ldr(1, 21))
    code.add(0xD34A3CA6)  # ubfx x6, x5, #10, #6
    code.add(0xD374CCC6)  # lsl x6, x6, #12
    code.add(a64.add_reg(6, 6, 20), a64.str(1, 6)).to(a64.b, "again")
    return code


class Log:
    """One way of keeping track of what the guest has dirtied."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def prepare(self, guest: Running) -> None:
        if self.mode == "clear-log":
            guest.kvm.enable_manual_dirty_log_protect(MANUAL_PROTECT_ENABLE)
        elif self.mode == "clear-log, all set":
            guest.kvm.enable_manual_dirty_log_protect(MANUAL_PROTECT_ENABLE | INITIALLY_SET)
        elif self.mode == "dirty-ring":
            vcpus, guest.kvm.vcpus = guest.kvm.vcpus, []
            guest.kvm.enable_dirty_ring(256)
            guest.kvm.vcpus = vcpus

    def collect(self, guest: Running, slot: int) -> set[int]:
        """The pages that are dirty; they are clean then."""
        if self.mode == "dirty-ring":
            kvm = guest.kvm
            found = [page for vcpu in kvm.vcpus for page in kvm.dirty_ring(vcpu).harvest()]
            assert kvm.reset_dirty_rings() == len(found)
            return {page for id, page in found if id == slot}
        log = guest.kvm.get_dirty_log(slot)
        if self.mode != "dirty-log":
            guest.kvm.clear_dirty_log(slot, 0, DIRTIED, log)
        return {page for first, count in dirty_runs(log) for page in range(first, first + count)}


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("mode", ["dirty-log", "clear-log", "clear-log, all set", "dirty-ring"])
def test_dirty_log(mode: str, cpus: int) -> None:
    """A page in the log has a value of this round or the last; one that is not has an older one, or is in the next.

    The log is also read in the middle of faults, wherever they can be interrupted.
    """
    log, chance = Log(mode), random.Random(3)
    with running(dirtying(cpus), smp=cpus) as guest:
        log.prepare(guest)
        hva = guest.slot(DIRTIED)
        slot = guest.slots - 1
        guest.kvm.set_memslot(slot, REGION // PAGE, DIRTIED, hva, MEM_LOG_DIRTY_PAGES)
        if mode == "clear-log, all set":
            assert log.collect(guest, slot) == set(range(DIRTIED))
        pending: set[int] = set()
        """Pages that had this round's value and were not in the log: they have to be in the next one."""
        state = {"round": 0, "logs": 0, "pages": 0}

        def collect() -> None:
            nonlocal pending
            number = state["round"]
            dirty = log.collect(guest, slot)
            missed: set[int] = set()
            for page in range(DIRTIED):
                value = guest.peek(hva + page * PAGE)
                if page in dirty:
                    assert value in (number, number - 1, 0) or page in pending, (page, value, number)
                elif value == number:
                    missed.add(page)
                else:
                    assert value <= number
            assert pending <= dirty
            pending = missed - collected
            collected.update(dirty)
            state["logs"] += 1
            state["pages"] += len(dirty)

        collected: set[int] = set()

        def hook(label: str) -> None:
            if label in ("kvm.fault.gup_done", "kvm.fast_fault.read", "kvm.fast_fault.set") and not chance.randrange(9):
                collect()

        for number in range(1, 30):
            state["round"] = number
            collected.clear()
            guest.put(CTRL, number)
            with on_point(hook):
                guest.slice(150 * cpus)
            collect()
        assert state["logs"] > 60
        assert state["pages"] > 500


@pytest.mark.parametrize("flags", [0, MANUAL_PROTECT_ENABLE, MANUAL_PROTECT_ENABLE | INITIALLY_SET])
def test_page_splitting(flags: int) -> None:
    """pages_2m turn into pages_4k by enabling or clearing, and are as many as before when logging has ended."""
    pages = 2 * HPAGE_SIZE // PAGE
    code = Code(a64.mov(21, CTRL), a64.mov(12, PAGE))
    code.label("again").add(a64.ldr(1, 21), a64.mov(20, REGION), a64.mov(22, pages))
    code.label("page").add(a64.str(1, 20), a64.add_reg(20, 20, 12), a64.subs(22, 22, 1)).to(a64.cbnz, 22, "page")
    code.to(a64.b, "again")

    def levels() -> tuple[int, int]:
        entries = guest.kvm.sptes.entries(REGION // PAGE, REGION // PAGE + pages)
        huge = sum(bool(spte & SPTE_HUGE) for _, spte in entries)
        return len(entries) - huge, huge

    with running(code, memory=16 << 20, thp="always", host_memory=64 << 20) as guest:
        guest.kvm.enable_manual_dirty_log_protect(flags)
        hva = -(-guest.mm.mmap(3 * HPAGE_SIZE, RWX) // HPAGE_SIZE) * HPAGE_SIZE
        guest.slot(pages, hva=hva)
        slot = guest.slots - 1
        guest.slice(pages * 6)
        assert levels() == (0, 2)
        guest.kvm.set_memslot(slot, REGION // PAGE, pages, hva, MEM_LOG_DIRTY_PAGES)
        guest.slice(pages * 6)
        if flags & INITIALLY_SET:
            assert levels() == (0, 2)
            guest.kvm.clear_dirty_log(slot, 0, pages, guest.kvm.get_dirty_log(slot))
            guest.slice(pages * 6)
        assert levels() == (pages, 0)
        assert guest.kvm.get_dirty_log(slot) == b"\xff" * (pages // 8)
        guest.kvm.set_memslot(slot, REGION // PAGE, pages, hva, 0)
        guest.slice(pages * 6)
        assert levels() == (0, 2)


@pytest.mark.parametrize("hook", ["clear_young", "clear_flush_young"])
def test_access_tracking(hook: str) -> None:
    """Pages that were marked idle are young again when the guest has touched them: all, for TLBs are flushed."""
    with running(dirtying()) as guest:
        hva = guest.slot(DIRTIED)
        for _ in range(5):
            guest.slice(DIRTIED * 60)
            assert all(guest.mm.notifiers.test_young(hva + page * PAGE) for page in range(DIRTIED))
            assert getattr(guest.mm.notifiers, hook)(hva, hva + DIRTIED * PAGE)
            assert not any(guest.mm.notifiers.test_young(hva + page * PAGE) for page in range(DIRTIED))


def sweeping(cpus: int) -> Code:
    """Each CPU n writes CTRL and its number into pages of its own, checks them, and says so at CTRL + 8 (n + 1)."""
    code = start_others(Code(), cpus, "entry") if cpus > 1 else Code()
    code.add(a64.movz(0, 0))
    code.label("entry").add(a64.add(9, 0, 1), a64.mov(21, CTRL), a64.mov(12, PAGE), a64.mov(13, PAGE * cpus))
    code.add(a64.mov(11, REGION), a64.madd(11, 0, 12, 11), a64.movz(14, 8), a64.madd(23, 9, 14, 21), a64.movz(8, 0))
    code.label("wait").add(a64.ldr(1, 21), a64.eor_reg(2, 1, 8)).to(a64.cbz, 2, "wait").add(a64.add(8, 1, 0))
    code.add(a64.add(20, 11, 0), a64.mov(22, 32)).label("write")
    code.add(a64.str(8, 20), a64.str(9, 20, 8), a64.add_reg(20, 20, 13), a64.subs(22, 22, 1)).to(a64.cbnz, 22, "write")
    code.add(a64.add(20, 11, 0), a64.mov(22, 32)).label("read")
    code.add(a64.ldr(2, 20)).fail_unless(2, 8)
    code.add(a64.ldr(2, 20, 8)).fail_unless(2, 9)
    code.add(a64.add_reg(20, 20, 13), a64.subs(22, 22, 1)).to(a64.cbnz, 22, "read")
    code.add(a64.str(8, 23)).to(a64.b, "wait")
    return code


@pytest.mark.parametrize("cpus", [2, 4])
def test_mmu_stress(cpus: int) -> None:
    """All memory from several vCPUs: written, all entries dropped, written again, read-only for the host, and gone."""
    pages = 32 * cpus
    with running(sweeping(cpus), smp=cpus) as guest:
        hva = guest.mm.mmap(pages * PAGE, RWX)
        for part in range(4):  # one slot for a quarter each
            guest.slot(pages // 4, REGION + part * pages // 4 * PAGE, hva=hva + part * pages // 4 * PAGE)
        changes: list[Callable[[], object]] = [
            lambda: None,
            lambda: guest.kvm.zap_gfn_range(REGION // PAGE, REGION // PAGE + pages, "reset"),
            lambda: [guest.mm.mprotect(hva, pages * PAGE, prot) for prot in (PROT_READ, RWX)],
            lambda: compact_memory(guest.machine.host, guest.machine.trace),
            lambda: guest.mm.notifiers.clear_young(hva, hva + pages * PAGE),
        ]
        for number, change in enumerate(changes, 1):
            change()
            guest.put(CTRL, number)
            guest.slice(100_000)
            assert not guest.failed()
            assert [guest.get(CTRL + 8 * (1 + cpu)) for cpu in range(cpus)] == [number] * cpus
            assert [guest.peek(hva + page * PAGE) for page in range(pages)] == [number] * pages
        for slot in range(guest.slots - 2, guest.slots):
            guest.kvm.delete_memslot(slot)
        guest.mm.munmap(hva, pages // 2 * PAGE)
        assert not [spte for _, spte in guest.kvm.sptes.entries(REGION // PAGE, REGION // PAGE + pages)]
        # The other half of the slots stays: that the address space ends finds their entries.
        guest.kvm.pre_fault_memory(RAM, PAGE)
        assert guest.kvm.sptes.present


def test_mprotect_stops_writes_only() -> None:
    """A read of what the host may only read is fine, and a write ends KVM_RUN with EFAULT, at the right page."""
    code = Code(a64.mov(20, REGION), a64.ldr(1, 20), a64.mov(21, CTRL), a64.str(1, 21), a64.str(1, 20, 8)).off()
    with running(code) as guest:
        hva = guest.slot(2)
        guest.poke(hva, 77)
        guest.mm.mprotect(hva, 2 * PAGE, PROT_READ)
        result = guest.end()
        assert guest.get(CTRL) == 77
        assert result.reason == "crash"
        assert result.report is not None
        assert f"guest frame {REGION // PAGE:#x}" in result.report.render()


def shared_info(updates: int) -> Code:
    """Reads pairs (n, ~n) at REGION, as guests read time, until n is ``updates``: never torn, never going back."""
    code = Code(a64.mov(20, REGION), a64.mov(10, updates), a64.movz(4, 0), a64.mov(21, CTRL))
    code.label("again").add(a64.ldr(1, 20), a64.ldr(2, 20, 8), a64.ldr(3, 20), a64.eor_reg(5, 1, 3))
    code.to(a64.cbnz, 5, "again")  # it was changed between the two
    code.add(a64.add_reg(6, 1, 2), a64.add(6, 6, 1)).to(a64.cbnz, 6, "empty")
    code.add(0xEB04003F, 0x54000042).to(a64.b, "torn").label("right")  # cmp x1, x4; b.hs .+8
    code.add(a64.add(4, 1, 0), a64.str(4, 21), a64.eor_reg(6, 1, 10)).to(a64.cbnz, 6, "again").off()
    code.label("empty").to(a64.cbz, 1, "zero").to(a64.b, "torn")
    code.label("zero").to(a64.cbnz, 2, "torn").to(a64.b, "again")  # a page that was just mapped
    return code.label("torn").add(a64.movz(7, 99)).fail_unless(1, 7).off()


def test_shared_info_by_a_cache_that_is_turned_off_and_on() -> None:
    """xen_shinfo_test: KVM writes the page by its cache, user space maps another one in its place, again and again."""
    updates = 60
    with running(shared_info(updates)) as guest:
        hva = guest.slot(1)
        cache = guest.kvm.pfn_caches.new()
        cache.activate(REGION, 16)

        def write(number: int) -> None:
            cache.write(number.to_bytes(8, "little") + (~number & (1 << 64) - 1).to_bytes(8, "little"))

        busy = False

        def hook(label: str) -> None:
            nonlocal busy
            if busy or label not in ("kvm.gpc.seq_read", "kvm.gpc.gup_done", "kvm.gpc.listed", "kvm.gpc.inactive"):
                return
            busy = True  # once in each refresh: /dev/zero in its place
            guest.mm.mmap(PAGE, RWX, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=hva)

        for number in range(1, updates):
            busy = False
            if number % 3 == 0:
                with on_point(hook):
                    cache.deactivate()
                    cache.activate(REGION, 16)
            elif number % 3 == 1:
                guest.mm.mmap(PAGE, RWX, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=hva)
            with on_point(hook):
                write(number)
            assert guest.peek(hva) == number
            guest.slice(60)
            assert guest.get(CTRL) == number
        write(updates)
        guest.finish()


ACCESSES: dict[str, Code] = {
    "read": Code(a64.mov(20, REGION), a64.ldr(1, 20)),
    "write": Code(a64.mov(20, REGION), a64.movz(1, 5), a64.str(1, 20)),
    "atomic": Code(a64.mov(20, REGION), a64.movz(1, 5), a64.ldxr(2, 20), a64.stxr(3, 1, 20)),
    "exec": Code(a64.mov(20, REGION), a64.blr(20)),
}


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize(
    ("access", "backing"),
    [
        (access, backing)
        for access in ACCESSES
        for backing in ("anonymous", "punched", "read-only")
        if (access, backing) != ("atomic", "read-only")  # an exclusive store to a device: no guest may do that
    ],
)
def test_page_fault_matrix(access: str, backing: str, logged: bool) -> None:
    """page_fault_test: each access against each kind of page: MMIO exits, faults, dirty bits."""
    writes = access in ("write", "atomic")
    code = Code()
    code._insns = list(ACCESSES[access]._insns)
    with running(code.off()) as guest:
        exits: list[tuple[str, int]] = []

        class Device:
            name = "device"

            def read(self, offset: int, size: int) -> int:
                exits.append(("read", offset))
                return 0

            def write(self, offset: int, size: int, value: int) -> None:
                exits.append(("write", offset))

        guest.machine.bus.map(REGION, PAGE, Device())
        flags = MEM_READONLY * (backing == "read-only") | MEM_LOG_DIRTY_PAGES * logged
        hva = guest.slot(1, flags=flags)
        guest.mm.write(hva, (0xD65F03C0).to_bytes(8, "little"))  # ret
        if backing == "punched":
            guest.mm.madvise(hva, PAGE, 4)
            if access == "exec":
                guest.mm.write(hva, (0xD65F03C0).to_bytes(8, "little"))
        faults: list[str] = []

        def watch(event: Any) -> None:
            if event.kind == "kvm_page_fault" and event.fields["gfn"] == REGION // PAGE:
                faults.append(event.fields["access"])

        guest.machine.trace.attach(watch)
        guest.finish()
        if backing == "read-only" and writes:
            assert {kind for kind, _ in exits} == {"write"}
        else:
            assert exits == []
            assert faults
            assert guest.peek(hva) == (5 if writes else 0 if backing == "punched" and access == "read" else 0xD65F03C0)
        if logged:
            dirty = guest.kvm.get_dirty_log(guest.slots - 1)[0]
            # A read that finds a page of the host's that may be written makes it writable at once, and counts.
            assert dirty == (1 if writes or backing == "anonymous" or access == "exec" else 0) * (
                backing != "read-only"
            )
