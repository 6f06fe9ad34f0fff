"""Random sequences against the naive model, in a memory so small that pages come and go all the time."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.mm import sequences
from tests.mm.world import Process, World, allowed
from xipvm.errors import OutOfFrames
from xipvm.mmu.reclaim import watch_memory

pytestmark = pytest.mark.slow


class TightWorld(World):
    """With watermarks and swap for everything. Nobody may be killed: that would be seen as memory that is gone."""

    frames = 51
    """12 of them above ``low``."""
    reclaimed = 0

    def __init__(self, folder: str, *, traced: bool = False, swap: int = 0) -> None:
        super().__init__(folder, traced=traced, swap=400)
        self.watched = watch_memory(self.host, self.trace)

    def check(self) -> None:
        self._file_entries_go()
        super().check()

    def swap(self, process: Process, pages: range, choice: int) -> None:
        """What is in swap comes back only if there is room for it."""
        if self.swaps < 2 or (self.swaps < 3 and not choice % 2):
            super().swap(process, pages, 2 * choice)
            return
        with allowed(errno.ENOMEM):
            process.mm.swapoff()
            self.swaps -= 1

    def migrate(self, process: Process, pages: range, choice: int) -> None:
        """There may be no frame to move a page to: migration takes none that is left for others."""
        try:
            super().migrate(process, pages, choice)
        except OutOfFrames:
            assert self.host.free_frames <= self.host.watermark

    def finish(self) -> None:
        type(self).reclaimed += self.watched.lru.reclaimed
        assert self.watched.kills == 0
        super().finish()


@pytest.mark.parametrize("seed", [0, 5000, 10_000])
def test_many_sequences_under_pressure(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "World", TightWorld)
    monkeypatch.setattr(TightWorld, "reclaimed", 0)
    sequences.run_many(100, seed, 40, str(tmp_path))
    assert TightWorld.reclaimed > 200
