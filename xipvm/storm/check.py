"""Does a storm show? A guest's calm run, and what differs from it in a stormy one.

Equal must be: how the run ended, what the console printed, how many instructions ran, and what RAM, flash and the files
of an image hold at the end. Memory is compared by content, as a host process reads it: pages that were never touched
are zero. Besides, what every secondary MMU translates then has to be what the host has.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.console import Console
from xipvm.devices.flash.files import ImageOption
from xipvm.errors import BadInput, InternalError
from xipvm.image_option import ImageChoice
from xipvm.machine import Machine
from xipvm.mmu.secondary import at_rest
from xipvm.result import RunResult
from xipvm.storm.storm import Storm

_ZERO = bytes(PAGE_SIZE)
_ERASED = b"\xff" * PAGE_SIZE
_SPARE_INSTRUCTIONS = 1_000_000
"""Beyond those of the calm run: a storm that keeps the guest from ending is noticed by then."""


@dataclass(frozen=True)
class Job:
    """What runs: a guest and its machine's options, as :class:`Machine` takes them. Nothing is written to images."""

    guest: str | None
    board: str | None = None
    memory: int | None = None
    smp: int = 1
    flash: tuple[ImageOption, ...] = ()
    stdin: bytes = b""
    until: str | None = None
    max_instructions: int | None = None
    protocol: str = "modern"
    thp: str = "madvise"
    host_memory: int | None = None
    swap: str | None = None
    secondary: str = "kvm"
    devices: tuple[str, ...] = ()
    image: ImageChoice | None = None
    map_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    reason: str
    """As RunResult has it; ``error`` when the model itself failed."""
    status: int
    output: bytes
    instructions: int
    ram: Mapping[int, bytes]
    """Pages by guest physical address, those that are not all zero."""
    flash: Mapping[int, bytes]
    """Pages by guest physical address, those that are not erased."""
    files: Mapping[int, bytes]
    """Likewise of the files of an image that are guest memory, those that are not all zero."""
    invalidations: int = 0
    operations: int = 0
    done: Mapping[str, int] = field(default_factory=dict)
    """Operations of the storm that were done, by name."""
    error: str = ""
    """Why the run ended, when it crashed."""


def run_once(job: Job, storm: Storm | None = None, *, limit: int | None = None) -> Outcome:
    """Run the guest. ``limit`` is of instructions, beside that of ``job``. Raises BadInput."""
    output = io.BytesIO()
    limits = [n for n in (limit, job.max_instructions) if n is not None]
    with Machine(
        job.guest,
        board=job.board,
        memory=job.memory,
        smp=job.smp,
        flash=[option._replace(snapshot=not option.readonly) for option in job.flash],
        console=Console(output, job.stdin),
        secondary=job.secondary,
        devices=job.devices,
        thp=job.thp,
        protocol=job.protocol,
        host_memory=job.host_memory,
        swap=job.swap,
        storm=storm,
        image=None if job.image is None else job.image._replace(snapshot=True),
        map_files=job.map_files,
    ) as machine:
        try:
            result = machine.run(max_instructions=min(limits, default=None), until=job.until)
            if result.reason == "interrupted":
                return _outcome(result, output.getvalue(), ({}, {}, {}), storm)
            for mmu in [*machine.secondaries(), *(() if storm is None else storm.secondaries())]:
                what = at_rest.difference(mmu)
                if what:
                    raise InternalError(what)
            memory = _ram(machine), _flash(machine), _files(machine)
            if storm is not None:
                storm.end()
            return _outcome(result, output.getvalue(), memory, storm)
        except BadInput:
            raise
        except Exception as error:  # whatever the model does not stand counts as a difference
            summary, what = machine.summary(), f"{type(error).__name__}: {error}"
            return Outcome(
                "error", 1, output.getvalue(), summary.instructions or 0, {}, {}, {}, summary.invalidations, error=what
            )


def _outcome(
    result: RunResult,
    output: bytes,
    memory: tuple[dict[int, bytes], dict[int, bytes], dict[int, bytes]],
    storm: Storm | None,
) -> Outcome:
    summary = result.summary
    return Outcome(
        result.reason,
        result.status,
        output,
        summary.instructions or 0,
        *memory,
        summary.invalidations,
        0 if storm is None else storm.operations,
        {} if storm is None else dict(storm.done),
        "" if result.report is None else result.report.render().splitlines()[0],
    )


def _ram(machine: Machine) -> dict[int, bytes]:
    base, mm = machine.board.ram_base, machine.mm
    first = machine.ram >> PAGE_SHIFT
    used = (page for page in range(machine.memory_size >> PAGE_SHIFT) if mm.pgd.pte(first + page))
    pages = ((page << PAGE_SHIFT, mm.read((first + page) << PAGE_SHIFT, PAGE_SIZE)) for page in used)
    return {base + offset: content for offset, content in pages if content != _ZERO}


def _flash(machine: Machine) -> dict[int, bytes]:
    found = {}
    for memory in machine.flash:
        for page in range(memory.bank.size >> PAGE_SHIFT):
            content = machine.host.read(memory.first + page, 0, PAGE_SIZE)
            if content != _ERASED:
                found[memory.bank.base + (page << PAGE_SHIFT)] = content
    return found


def _files(machine: Machine) -> dict[int, bytes]:
    return {} if machine.image_memory is None else dict(machine.image_memory.contents(machine.mm))


def stormy_limit(calm: Outcome) -> int:
    """How many instructions a stormy run may take."""
    return calm.instructions + _SPARE_INSTRUCTIONS


def difference(calm: Outcome, stormy: Outcome) -> str:
    """The first thing in which two runs differ, one line; empty when there is none."""
    if (calm.reason, calm.status) != (stormy.reason, stormy.status):
        why = f": {stormy.error}" if stormy.error else ""
        return f"ends with {stormy.reason}, status {stormy.status}, not {calm.reason}, status {calm.status}{why}"
    if calm.output != stormy.output:
        at = _first_difference(calm.output, stormy.output)
        return f"console differs at byte {at}: {calm.output[at : at + 40]!r} became {stormy.output[at : at + 40]!r}"
    if calm.instructions != stormy.instructions:
        return f"runs {stormy.instructions} instructions, not {calm.instructions}"
    return (
        _memory_difference("RAM", calm.ram, stormy.ram, _ZERO)
        or _memory_difference("flash", calm.flash, stormy.flash, _ERASED)
        or _memory_difference("what is mapped of the image", calm.files, stormy.files, _ZERO)
    )


def _memory_difference(what: str, calm: Mapping[int, bytes], stormy: Mapping[int, bytes], empty: bytes) -> str:
    if calm == stormy:
        return ""
    different = sorted(gpa for gpa in {*calm, *stormy} if calm.get(gpa, empty) != stormy.get(gpa, empty))
    gpa = different[0]
    before, after = calm.get(gpa, empty), stormy.get(gpa, empty)
    at = _first_difference(before, after)
    return (
        f"{what} differs in {len(different)} {'page' if len(different) == 1 else 'pages'}, first at gpa {gpa + at:#x}: "
        f"{before[at : at + 8].hex(' ')} became {after[at : at + 8].hex(' ')}"
    )


def _first_difference(one: bytes, other: bytes) -> int:
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)
