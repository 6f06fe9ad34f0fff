"""Guests that are larger than the host's memory: right answers from swap, and what 2008's notifiers were for."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.run.command import ISAS, UBOOT, guest, needs_uboot, read_until, start, xipvm
from xipvm import Event, Machine
from xipvm.console import Console
from xipvm.mmu.mm import Mm
from xipvm.mmu.verify import verify
from xipvm.storm import Storm

pytestmark = pytest.mark.slow

PAGES = 1024
"""4 MiB, of which a host of 1 MiB can hold less than a quarter."""
SMALL = ("--memory", "16M", "--host-memory", "1M")


@pytest.fixture
def number(tmp_path: Path) -> Path:
    """Console input that makes ``pages`` touch so many."""
    path = tmp_path / "pages.txt"
    path.write_text(f"{PAGES}\n")
    return path


@pytest.mark.parametrize("isa", ISAS)
def test_four_times_the_hosts_memory(isa: str, number: Path) -> None:
    """The same answer as with enough of it; swap-ins and swap-outs are told."""
    calm = xipvm("run", "--memory", "16M", "--input", number, guest("pages", isa))
    tight = xipvm("run", *SMALL, "--swap", "16M", "--input", number, guest("pages", isa))
    assert (calm.status, tight.status) == (0, 0)
    assert tight.lines == calm.lines
    assert f"pages: {PAGES} pages" in calm.lines[0]
    assert "swap" not in calm.err
    said = re.search(r"(\d+) pages reclaimed, (\d+) swap-outs, (\d+) swap-ins", tight.err)
    assert said is not None
    reclaimed, outs, ins = map(int, said.groups())
    assert ins > 2 * PAGES
    assert reclaimed == outs > 3 * PAGES


@pytest.mark.parametrize("isa", ISAS)
def test_pinned_pages_cannot_be_swapped(isa: str, number: Path) -> None:
    """What KVM did before there were notifiers: with as much swap as one likes, the guest is killed."""
    run = xipvm("run", *SMALL, "--swap", "16M", "--pin-sptes", "--input", number, guest("pages", isa))
    assert run.status == 137
    lines = run.err.splitlines()
    assert lines[0].startswith("host out of memory: mm0 needed a page, nothing could be reclaimed; killed mm0")
    report = "\n".join(lines)
    assert "223 pages in memory (223 anonymous" in report
    assert "223 of them pinned (223 by shadow entries), 0 reclaimable" in report
    assert "255 frames, 32 free; watermarks min 32, low 40, high 48" in report
    assert "4096 slots" in report
    assert "without --pin-sptes, 223 pages could have gone to swap" in report
    assert "xipvm: the host was out of memory and killed the machine's process, status 137" in lines
    assert "pages: 0 wrong" not in run.out


@pytest.mark.parametrize(
    ("swap", "advice"), [((), "swap: --swap SIZE would have had room"), (("--swap", "1M"), "all 256 slots are in use")]
)
def test_without_room_in_swap(swap: tuple[str, ...], advice: str, number: Path) -> None:
    run = xipvm("run", *SMALL, *swap, "--input", number, guest("pages", "arm64"))
    assert run.status == 137
    assert advice in run.err


def test_pins_do_no_harm_where_there_is_room(number: Path) -> None:
    run = xipvm("run", "--memory", "16M", "--pin-sptes", "--input", number, guest("pages", "arm64"))
    assert run.status == 0


def test_every_event_of_a_run_under_pressure_is_in_order(number: Path) -> None:
    run = xipvm("run", "--check", *SMALL, "--swap", "16M", "--input", number, guest("pages", "arm64"))
    assert run.status == 0
    assert "events checked, 0 violations" in run.err


@pytest.mark.parametrize("pinned", [(), ("--pin-sptes",)])
def test_equal_runs_leave_equal_traces(number: Path, tmp_path: Path, pinned: tuple[str, ...]) -> None:
    traces = []
    for name in ("one", "two"):
        path = tmp_path / name
        xipvm("run", "--trace", path, *SMALL, "--swap", "8M", *pinned, "--input", number, guest("pages", "riscv64"))
        traces.append(path.read_bytes())
    assert len(traces[0]) > 10_000
    assert traces[0] == traces[1]


def test_the_bookkeeping_after_a_run(number: Path) -> None:
    events: Counter[str] = Counter()

    def sink(event: Event) -> None:
        events[event.kind] += 1

    console = Console(io.BytesIO(), number.read_bytes())
    with Machine(guest("pages", "arm64"), memory=16 << 20, host_memory=1 << 20, swap="16M", console=console) as machine:
        machine.trace.attach(sink)
        result = machine.run()
        verify(machine.host)
        assert result.status == 0
        assert result.summary.swap_outs == events["swap_out"]
        assert result.summary.swap_ins == events["swap_in"]
        assert machine.host.free_frames >= machine.reclaim.marks.min
        assert events["kswapd_wake"] == events["kswapd_sleep"] == machine.reclaim.kswapd_runs
        assert events["workingset_refault"] == machine.reclaim.workingset.refaults > 0


def test_a_fork_that_is_killed_leaves_the_guest_alone(number: Path) -> None:
    """The largest goes: the guest's process here is told to be spared, its child is not."""
    console = Console(io.BytesIO(), number.read_bytes())
    with Machine(guest("pages", "arm64"), memory=16 << 20, host_memory=5 << 20, console=console) as machine:
        machine.mm.oom_score_adj = -1000
        machine.run(max_instructions=100_000)
        child = machine.mm.fork("child")
        result = machine.run()
        assert result.status == 0
        assert child.oom is not None
        assert child.dead
        verify(machine.host)


def test_a_machine_that_is_killed_while_it_does_not_run(number: Path) -> None:
    """For somebody else's sake. It ends as soon as it is to go on, and can be closed."""
    console = Console(io.BytesIO(), number.read_bytes())
    with Machine(guest("pages", "arm64"), memory=16 << 20, host_memory=8 << 20, console=console) as machine:
        machine.run(max_instructions=60_000)
        other = Mm(machine.host, machine.trace, name="other")
        other.oom_score_adj = -1000
        start = other.mmap(8 << 20, 3)
        for page in range(1500):
            other.write(start + page * 4096, b"x")
        assert machine.mm.dead
        result = machine.run()
        assert (result.status, result.reason) == (137, "oom")
        assert result.report is not None
        assert "other needed a page" in result.report.render()
        other.exit()


# ---- swap files


def test_a_swap_file_stays_and_can_be_used_again(number: Path, tmp_path: Path) -> None:
    swap = tmp_path / "swap.img"
    first = xipvm("run", *SMALL, "--swap", f"{swap},size=16M", "--input", number, guest("pages", "arm64"))
    assert first.status == 0
    assert swap.stat().st_size == 16 << 20
    second = xipvm("run", *SMALL, "--swap", swap, "--input", number, guest("pages", "arm64"))
    assert (second.status, second.out) == (0, first.out)


def test_a_file_system_that_is_full(number: Path, tmp_path: Path) -> None:
    """A swap file has all its blocks before the run begins."""
    limit = ("prlimit", f"--fsize={1 << 20}")
    swap = f"{tmp_path / 'swap'},size=16M"
    run = xipvm("run", *SMALL, "--swap", swap, "--input", number, guest("pages", "arm64"), prefix=limit)
    assert run.status == 2
    assert run.err == f"xipvm: {tmp_path / 'swap'}: File too large\n"


def test_swap_that_fails_half_way(number: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.pwrite, 0

    def full(fd: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += 1
        if written > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr("xipvm.mmu.swap.os.pwrite", full)
    console = Console(io.BytesIO(), number.read_bytes())
    with Machine(guest("pages", "arm64"), memory=16 << 20, host_memory=1 << 20, swap="16M", console=console) as machine:
        result = machine.run()
        assert (result.status, result.reason) == (137, "oom")
        assert result.report is not None
        assert "reads or writes failed" in result.report.render()
        assert result.summary.swap_outs == 100
        assert result.summary.swap_errors > 0


def test_swap_that_cannot_be_read(number: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest has lost a page: it cannot go on, and the report says why."""

    def broken(fd: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("xipvm.mmu.swap.os.pread", broken)
    console = Console(io.BytesIO(), number.read_bytes())
    with Machine(guest("pages", "arm64"), memory=16 << 20, host_memory=1 << 20, swap="16M", console=console) as machine:
        result = machine.run()
        assert (result.status, result.reason) == (1, "crash")
        assert result.report is not None
        assert "no page behind guest frame" in result.report.render()
        assert "SIGBUS" in result.report.render()


def test_a_killed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary swap file never had a name; a swap file of the user's is free for the next."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    number = tmp_path / "many"
    number.write_text("4096\n")
    swap = tmp_path / "swap"
    for where in ("64M", f"{swap},size=64M"):
        with start(
            "run", "--memory", "64M", "--host-memory", "1M", "--swap", where, "--input", number, guest("pages", "arm64")
        ) as child:
            read_until(child, b"sequential")  # a great many pages have gone by then
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert not list(folder.iterdir())
    run = xipvm("run", "--memory", "16M", "--swap", swap, guest("hello", "arm64"))
    assert run.status == 0


def test_two_runs_do_not_share_a_swap_file(tmp_path: Path, number: Path) -> None:
    swap = tmp_path / "swap"
    with Machine(guest("hello", "arm64"), swap=f"{swap},size=64K"):
        run = xipvm("run", "--swap", swap, guest("hello", "arm64"))
    assert (run.status, run.err) == (2, f"xipvm: {swap}: is in use by another run\n")


def test_a_closed_machine_has_closed_its_swap() -> None:
    def descriptors() -> int:
        with Machine(guest("hello", "arm64"), swap="1M"):
            pass
        return len(os.listdir("/proc/self/fd"))

    assert descriptors() == descriptors()


# ---- a firmware


@needs_uboot
def test_uboot_in_a_mebibyte(tmp_path: Path) -> None:
    """It relocates itself to the end of RAM, and zeroes its heap: most of that goes through swap."""
    script = tmp_path / "input"
    script.write_text("\nversion\nflinfo\nsetenv a b\nprintenv a\n")
    calm = xipvm("run", "--input", script, "--until", "=>", UBOOT)
    tight = xipvm("run", "--host-memory", "1M", "--swap", "64M", "--input", script, "--until", "=>", UBOOT)
    assert (calm.status, tight.status) == (0, 0)
    assert tight.out == calm.out
    assert "swap-out" in tight.err


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_in_a_small_memory(seed: int) -> None:
    """Forks, migration, KSM and the rest, while there is never a frame to spare."""

    def run(seed: int | None) -> bytes:
        output = io.BytesIO()
        with Machine(
            guest("pages", "arm64"),
            memory=16 << 20,
            host_memory=1 << 20,
            swap="64M",
            storm=None if seed is None else Storm(seed),
            console=Console(output, b"600\n"),
        ) as machine:
            result = machine.run()
            assert result.status == 0
            assert result.summary.reclaimed > 1000
            assert machine.reclaim.kills == 0
        return output.getvalue()

    assert run(seed) == run(None)
