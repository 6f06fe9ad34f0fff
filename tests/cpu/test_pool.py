"""Engines are pooled: what comes out of the pool is as new, and nothing of the machine before is left in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.asm import a64, rv64, words
from tests.cpu.conftest import CODE, DATA, DEVICE, EXCEPTION, OK, PAGE, RX, Box
from xipvm.cpu import core
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.tables import PageTable

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    """So that an engine that is given back is the next one out."""
    core.drain_pool()
    yield
    core.drain_pool()


def test_an_engine_comes_back(isa: int, make_box: Callable[..., Box]) -> None:
    box = make_box(isa)
    engine = box.engine
    engine.release()
    assert core.pooled() == 1
    assert core.take_engine(isa, True) is engine
    assert core.pooled() == 0
    assert core.take_engine(isa, True) is not engine


def test_each_kind_has_its_own_place(make_box: Callable[..., Box]) -> None:
    for kind in (core.ARM64, core.RISCV64):
        for clock in (True, False):
            make_box(kind, counted=clock).engine.release()
    assert core.pooled() == 4
    taken = core.take_engine(core.RISCV64, False)
    assert (taken.isa, taken.counted) == (core.RISCV64, False)


def test_registers_are_those_of_a_new_engine(isa: int, make_box: Callable[..., Box]) -> None:
    new = make_box(isa)
    state = registers(new)
    for n in range(1, 29):
        new.set_x(n, 0x1111 * n)
    new.set_pc(0x1234)
    if new.arm:
        new.engine.set_reg(core.ARM64_SP, 0x7000)
        new.engine.set_reg(core.ARM64_PSTATE, 0x3C0)
        for register in (a64.VBAR_EL1, a64.ELR_EL1, a64.SP_EL1, a64.FAR_EL1):
            new.engine.set_cp_reg(*register, 0x8000)
    else:
        for csr in (core.RISCV_MTVEC, core.RISCV_MEPC, core.RISCV_SATP, core.RISCV_MIE, core.RISCV_MEDELEG):
            new.engine.set_reg(csr, 0x80)
        new.engine.set_reg(core.RISCV_PRIV, 0)
    assert registers(new) != state
    new.engine.release()
    assert registers(make_box(isa)) == state


def registers(box: Box) -> list[int]:
    engine = box.engine
    values = [box.pc(), *(box.x(n) for n in range(29))]
    if box.arm:
        values += [engine.reg(core.ARM64_SP), engine.reg(core.ARM64_PSTATE), engine.reg128(core.ARM64_X0)]
        values += [engine.cp_reg(*r) for r in (a64.VBAR_EL1, a64.ELR_EL1, a64.SP_EL1, a64.FAR_EL1, a64.SCTLR_EL1)]
    else:
        values.append(engine.reg(core.RISCV_PRIV))
        privilege = engine.reg(core.RISCV_PRIV)
        engine.set_reg(core.RISCV_PRIV, 3)
        csrs = (core.RISCV_MTVEC, core.RISCV_MEPC, core.RISCV_SATP, core.RISCV_MIE, core.RISCV_MEDELEG)
        values += [engine.reg(r) for r in csrs]
        engine.set_reg(core.RISCV_PRIV, privilege)
    return values


def test_no_code_of_the_machine_before_runs(isa: int, make_box: Callable[..., Box]) -> None:
    """Same guest address, same frame number, other bytes."""
    for value in (1, 2, 3):
        box = make_box(isa)
        box.page(CODE, box.answer(value), RX)
        assert box.engine.run(CODE) == OK
        assert box.x(2) == value
        box.engine.release()


def test_no_translation_of_the_machine_before_is_used(isa: int, make_box: Callable[..., Box]) -> None:
    old = make_box(isa)
    old.page(CODE, old.load(), RX)
    old.page(DATA, b"old")
    old.set_x(1, DATA)
    old.engine.run(CODE)
    old.engine.release()
    new = make_box(isa)
    new.page(CODE, new.load(), RX)
    new.set_x(1, DATA)
    assert new.engine.run(CODE) == EXCEPTION
    new.page(DATA, b"new")
    assert new.engine.run(CODE) == OK
    assert new.x(2).to_bytes(8, "little")[:3] == b"new"


def test_counts_kicks_and_hooks_start_anew(make_box: Callable[..., Box]) -> None:
    old = make_box(core.RISCV64)
    old.page(CODE, words(rv64.csrrs(2, rv64.CYCLE, 0)) + old.answer(1), RX)
    old.engine.on_insn = lambda pc, size: None
    old.engine.run(CODE)
    assert old.engine.insns == 3
    old.engine.leave(core.KICK_EXIT)
    old.engine.release()

    new = make_box(core.RISCV64)
    assert (new.engine.insns, new.engine.ticks, new.engine.kick, new.engine.flushes) == (0, 0, 0, 0)
    new.page(CODE, new.answer(7), RX)
    hooked: list[int] = []
    new.engine.on_insn = lambda pc, size: hooked.append(pc)
    assert new.engine.run(CODE) == OK
    assert (new.x(2), hooked, new.engine.insns) == (7, [], 2)


def test_an_uncounted_hart_that_was_polled_is_not_any_more(make_box: Callable[..., Box]) -> None:
    old = make_box(core.RISCV64, counted=False)
    old.page(CODE, words(rv64.csrrs(2, rv64.CYCLE, 0)) + old.answer(1), RX)
    old.engine.on_insn = lambda pc, size: None
    assert old.engine.run(CODE) == OK
    old.engine.release()
    new = make_box(core.RISCV64, counted=False)
    assert new.engine is old.engine
    new.page(CODE, new.store_loop(), RX)
    for n, value in ((1, DEVICE), (2, 0), (3, 1000)):
        new.set_x(n, value)
    new.on_write = lambda value: new.engine.leave(core.KICK_EXIT) if value == 10 else None
    assert new.engine.run(CODE) == OK
    assert (new.x(2), new.engine.stopped) == (10, False)


def test_release_with_every_handler_set(box: Box) -> None:
    """None of them is called any more, and none is kept."""
    engine = box.engine
    box.page(0, box.answer(1), RX)
    engine.run(0)
    called: list[str] = []
    names = ["on_miss", "on_read", "on_write", "on_insert", "on_flush", "on_drop", "on_sysreg", "on_insn"]
    for name in names:
        setattr(engine, name, lambda *args, name=name: called.append(name))
    engine.record_inserts(True)
    engine.release()
    assert called == []
    assert [getattr(engine, name) for name in names] == [None] * len(names)
    engine.release()  # a second time does nothing
    assert core.pooled() == 1


def test_no_release_while_the_guest_runs(box: Box) -> None:
    box.page(CODE, box.store_loop(), RX)
    for n, value in ((1, DEVICE), (2, 0), (3, 5)):
        box.set_x(n, value)
    box.on_write = lambda value: box.engine.release()
    with pytest.raises(core.EngineError, match="runs"):
        box.engine.run(CODE)
    box.on_write = None
    box.engine.kick = 0
    box.set_x(3, 5)
    assert box.engine.run(CODE) == OK
    assert box.x(3) == 0


def test_no_close_while_in_a_machine(box: Box) -> None:
    with pytest.raises(core.EngineError, match="in use"):
        box.engine.close()


def test_32_engines_and_no_more(isa: int, make_box: Callable[..., Box]) -> None:
    box = make_box(isa, engines=32, frames=8)
    assert len({engine.bit for engine in box.engines}) == 32
    one_more = core.take_engine(isa, True)
    with pytest.raises(core.EngineError, match="32"):
        one_more.bind(box.group, box.sptes)
    box.engines.pop(7).release()
    one_more.bind(box.group, box.sptes)
    assert one_more.bit == 1 << 7


def test_an_engine_with_much_memory_keeps_it_mapped(isa: int) -> None:
    hosts = [HostMemory(65 << 20), HostMemory(65 << 20)]
    groups = [core.EngineGroup(host) for host in hosts]
    engine = core.take_engine(isa, True, groups[0])
    engine.bind(groups[0], PageTable(3))
    engine.release()
    assert core.pooled() == 1
    engine.flush_tlb("late")  # what a notifier may still ask for
    engine.leave(core.KICK_EXIT)
    assert core.take_engine(isa, True, groups[1]) is not engine  # that has other memory
    again = core.take_engine(isa, True, groups[0])
    assert again is engine
    again.bind(groups[0], PageTable(3))
    again.release()
    engine.bind(groups[1], PageTable(3))  # one that has other memory mapped takes this instead
    engine.release()
    for group, host in zip(groups, hosts, strict=True):
        group.close()
        host.close()


def test_few_engines_keep_much_memory(isa: int) -> None:
    host = HostMemory(65 << 20)
    group = core.EngineGroup(host)
    engines = [core.take_engine(isa, True, group) for _ in range(7)]
    for engine in engines:
        engine.bind(group, PageTable(3))
    for engine in engines:
        engine.release()
    assert core.pooled() == 4
    group.close()
    host.close()


def test_an_arena_is_at_its_old_address_again_and_empty() -> None:
    """So that the engine that has it mapped can be taken."""
    small = HostMemory(1 << 20)
    address = small.arena_address
    small.write(small.alloc(), 0, b"old")
    small.close()
    small = HostMemory(1 << 20)
    assert small.arena_address == address
    assert small.read(small.alloc(zero=False), 0, 3) == b"\0\0\0"
    small.close()


def test_device_frames_are_mapped_and_run(isa: int, make_box: Callable[..., Box]) -> None:
    """Flash: frames beside the arena, executed in place."""
    box = make_box(isa, engines=0)
    array = HostMemory(4 * PAGE)
    page = array.alloc()
    first = box.host.add_device(array.address(page), PAGE, array)
    box.add_engine()
    array.write(page, 0, box.answer(9))
    box.page(CODE, rights=RX, pfn=first)
    assert box.engine.run(CODE) == OK
    assert box.x(2) == 9
    array.write(page, 0, box.answer(10))
    box.group.drop_code(first)
    assert box.engine.run(CODE) == OK
    assert box.x(2) == 10


GARBAGE = """
import gc
from tests.cpu.conftest import CODE, RX, Box
from xipvm.cpu import core
for isa in (core.ARM64, core.RISCV64):
    box = Box(isa, engines=2)
    pfn = box.page(CODE, box.answer(1), RX)
    for engine in box.engines:
        engine.run(CODE)
    host = box.host
    del box, engine
    gc.collect()
    host.write(pfn, 0, b"written")
print("fine")
"""


def test_a_machine_that_is_dropped_without_closing_takes_its_hook_along() -> None:
    """The host memory may outlive it; a crash here would be one of the process, so it is tried in a child."""
    done = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
