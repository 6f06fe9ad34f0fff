"""A stop that comes from outside, in the middle of an access, leaves no instruction half done."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from xipvm.cpu import core
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.secondary.spte import PFN_SHIFT, SPTE_READ_ONLY, SPTE_WRITABLE
from xipvm.mmu.tables import PageTable

CODE, DATA = 1, 16
"""Guest frames: the code's, and the first of the data."""

X1 = core.ARM64_X0 + 1
HVC = 0xD4000002

CHASE = (
    0xF9400000,  # 1: ldr x0, [x0]
    0x91000421,  # add   x1, x1, #1
    0xB5FFFFC0,  # cbnz  x0, 1b
    HVC,
)
INCREMENT = (
    0xC85F7C02,  # 1: ldxr x2, [x0]
    0x91000442,  # add   x2, x2, #1
    0xC8037C02,  # stxr  w3, x2, [x0]
    0x35FFFFA3,  # cbnz  w3, 1b
    HVC,
)


class Guest:
    """An uncounted engine whose every miss is followed by a signal, before the access that missed goes on."""

    def __init__(self, host: HostMemory, code: tuple[int, ...], frames: list[int]) -> None:
        self.sptes = PageTable(3)
        self.frames = frames
        self.group = core.EngineGroup(host)
        self.engine: Any = core.take_engine(core.ARM64, False)
        self.engine.bind(self.group, self.sptes)
        self.engine.on_miss = self._miss
        self.stops = 0
        page = host.alloc()
        host.write(page, 0, struct.pack(f"<{len(code)}I", *code))
        self.sptes.set(CODE, page << PFN_SHIFT | SPTE_READ_ONLY)

    def _miss(self, gva: int, access: int) -> int:
        spte = SPTE_WRITABLE if access == core.WRITE else SPTE_READ_ONLY
        self.sptes.set(gva >> 12, self.frames[(gva >> 12) - DATA] << PFN_SHIFT | spte)
        os.kill(os.getpid(), signal.SIGTERM)
        return int(core.RETRY_WALK)

    def run(self) -> None:
        """From the start of the code to its HVC."""
        pc = CODE << 12
        with core.SignalGuard(60.0):
            while True:
                assert self.engine.run(pc) == 0
                core.take_signals()
                self.engine.kick = 0
                if self.engine.interrupt >= 0:
                    return
                pc = self.engine.reg(core.ARM64_PC)
                self.stops += 1


@pytest.fixture
def host() -> Iterator[HostMemory]:
    memory = HostMemory(1 << 20)
    yield memory
    memory.close()


@contextmanager
def guest(host: HostMemory, code: tuple[int, ...], frames: list[int]) -> Iterator[Guest]:
    made = Guest(host, code, frames)
    yield made
    made.group.close()


def test_a_load_over_its_own_address_is_not_repeated(host: HostMemory) -> None:
    frames = [host.alloc() for _ in range(8)]
    for n, frame in enumerate(frames[:-1]):
        host.write(frame, 8 * n, struct.pack("<Q", (DATA + n + 1 << 12) + 8 * (n + 1)))
    with guest(host, CHASE, frames) as chase:
        chase.engine.set_reg(core.ARM64_X0, DATA << 12)
        chase.engine.set_reg(X1, 0)
        chase.run()
        assert chase.engine.reg(X1) == len(frames)
        assert chase.stops == len(frames)


def test_an_exclusive_store_is_not_repeated(host: HostMemory) -> None:
    frame = host.alloc()
    with guest(host, INCREMENT, [frame]) as increment:
        increment.engine.set_reg(core.ARM64_X0, DATA << 12)
        increment.run()
        assert increment.stops == 1
    assert struct.unpack("<Q", host.read(frame, 0, 8)) == (1,)
