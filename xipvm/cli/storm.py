"""``xipvm storm``: a guest's calm run, and many stormy ones that must be equal to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from xipvm.cli.run import check_start, read_input
from xipvm.devices.flash.files import parse_option
from xipvm.errors import BadInput
from xipvm.image_option import parse_image
from xipvm.mmu.swap_file import parse_swap
from xipvm.storm import Storm
from xipvm.storm.check import Job, Outcome, difference, run_once, stormy_limit
from xipvm.storm.storm import GROUPS

if TYPE_CHECKING:
    from multiprocessing.pool import IMapIterator

WAKE: Final = 0.2
"""How long a wait for workers may be before it is begun again, s."""

Found = tuple[int, str, int, int, bool]
"""Of a seed: itself, how it differs, its invalidations and operations, whether Ctrl-C ended it."""

_task: tuple[Job, Outcome, int, tuple[str, ...] | None] | None = None
"""Of a worker process: what it runs."""


def storm_guest(
    *,
    guest: str | None,
    board: str | None,
    memory: int | None,
    smp: int,
    flash: tuple[str, ...],
    input_file: str | None,
    until: str | None,
    max_instructions: int | None,
    secondary: str,
    devices: tuple[str, ...],
    protocol: str,
    thp: str,
    host_memory: int | None,
    swap: str | None,
    image: str | None,
    map_files: tuple[str, ...],
    seeds: int,
    first: int,
    rate: int,
    ops: str | None,
    jobs: int,
) -> int:
    """Run the guest calmly and under ``seeds`` storms. The exit status: 0, 1 with a difference, 130 after Ctrl-C."""
    if ops == "help":
        list_operations()
        return 0
    check_start(guest, board, flash, until)
    if jobs > 1 and swap is not None and parse_swap(swap).path is not None:
        raise BadInput("a swap file is one run's at a time: --jobs 1, or a temporary one, --swap SIZE")
    names = None if ops is None else tuple(ops.split("+"))
    Storm(first, rate=rate, ops=names)  # complains before anything runs
    job = Job(
        guest,
        board,
        memory,
        smp,
        tuple(parse_option(text) for text in flash),
        b"" if input_file is None else read_input(input_file),
        until,
        max_instructions,
        protocol,
        thp,
        host_memory,
        swap,
        secondary,
        devices,
        None if image is None else parse_image(image),
        map_files,
    )
    calm = run_once(job)
    if calm.reason == "interrupted":
        _say("xipvm: interrupted")
        return calm.status
    differing: list[Found] = []
    done = invalidations = operations = 0
    interrupted = False
    try:
        _say(f"calm: {calm.reason}, status {calm.status}, {calm.instructions} instructions")
        with _progress(seeds) as advance:
            for found in _results((job, calm, rate, names), range(first, first + seeds), jobs):
                seed, what, count, made, interrupted = found
                if interrupted:
                    break
                done += 1
                invalidations += count
                operations += made
                if what:
                    differing.append(found)
                advance(len(differing))
    except KeyboardInterrupt:  # between two runs; one that is under way ends by it
        interrupted = True
    for seed, what, *_ in differing[:10]:
        print(f"seed {seed}: {what}")
    if differing:
        setting = f"{differing[0][0]},rate={rate}" + ("" if ops is None else f",ops={ops}")
        print(f"replay: {_command(setting, job, flash, input_file, image)}")
    print(f"{done} seeds, {len(differing)} differ; {operations} operations, {invalidations} invalidations")
    if interrupted:
        _say(f"xipvm: interrupted after {done} of {seeds} seeds")
        return 128 + signal.SIGINT
    return int(bool(differing))


def list_operations() -> None:
    """The operations that a storm can have, by the groups that stand for several."""
    for group, members in GROUPS.items():
        print(
            textwrap.fill(
                " ".join(members), 78, initial_indent=f"{group:8} ", subsequent_indent=" " * 9, break_on_hyphens=False
            )
        )


def _one(task: tuple[Job, Outcome, int, tuple[str, ...] | None], seed: int) -> Found:
    job, calm, rate, names = task
    stormy = run_once(job, Storm(seed, rate=rate, ops=names), limit=stormy_limit(calm))
    interrupted = stormy.reason == "interrupted"
    return seed, difference(calm, stormy), stormy.invalidations, stormy.operations, interrupted


def _results(task: tuple[Job, Outcome, int, tuple[str, ...] | None], seeds: range, jobs: int) -> Iterator[Found]:
    """What the seeds give, in their order."""
    if jobs == 1:
        yield from (_one(task, seed) for seed in seeds)
        return
    # No Ctrl-C before all workers are known, which are to be ended by it, nor to those that have not come to _begin.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with multiprocessing.get_context("fork").Pool(jobs, _begin, (task,)) as pool:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            results = pool.imap(_work, seeds)
            for _ in seeds:
                yield _next(results)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _next(results: IMapIterator[Found]) -> Found:
    """The next of them. A signal that comes just before a wait does not end it, so no wait is for ever."""
    while True:
        try:
            return results.next(WAKE)
        except multiprocessing.TimeoutError:
            continue


def _begin(task: tuple[Job, Outcome, int, tuple[str, ...] | None]) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


def _work(seed: int) -> Found:
    assert _task is not None
    found = _one(_task, seed)
    if found[-1]:
        # A run takes SIGTERM, by which the parent ends its workers, for a wish to end the run.
        raise SystemExit(128 + signal.SIGTERM)
    return found


@contextlib.contextmanager
def _progress(seeds: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda differing: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("storm"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[differ]} differ"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("storm", total=seeds, differ=0)
        yield lambda differing: progress.update(bar, advance=1, differ=differing)


def _command(setting: str, job: Job, flash: tuple[str, ...], input_file: str | None, image: str | None) -> str:
    """The command line that runs one storm again. Flash and image are not written back here, either."""
    words = ["xipvm", "run", "--storm", setting]
    options = {
        "--board": job.board,
        "--memory": job.memory,
        "--input": os.devnull if input_file is None else input_file,
        "--until": job.until,
        "--max-instructions": job.max_instructions,
        "--smp": None if job.smp == 1 else job.smp,
        "--secondary": None if job.secondary == "kvm" else job.secondary,
        "--protocol": None if job.protocol == "modern" else job.protocol,
        "--thp": None if job.thp == "madvise" else job.thp,
        "--host-memory": job.host_memory,
        "--swap": job.swap,
    }
    for name, value in options.items():
        if value is not None:
            words += [name, str(value)]
    for name in job.devices:
        words += ["--device", name]
    for text in flash:
        option = parse_option(text)
        words += ["--flash", text if option.snapshot or option.readonly else f"{text},snapshot=on"]
    if image is not None:
        choice = parse_image(image)
        words += ["--image", image if choice.snapshot or choice.readonly else f"{image},snapshot=on"]
    for text in job.map_files:
        words += ["--map", text]
    return shlex.join([*words, *filter(None, [job.guest])])


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
