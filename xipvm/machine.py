"""One machine: a board, host memory and its mm, a secondary MMU, vCPUs, devices, and the trace of what they do.

A machine is built from a guest ELF (placed in flash and RAM by its program headers), flash images and a
board, and then runs until the guest ends it, crashes, or a limit is reached.

**Time.** On the ``instructions`` clock one retired instruction is one nanosecond, of all vCPUs together; an
idle machine jumps to its next event. vCPUs take turns by instruction quantum, so a run is a function of its
inputs. On the ``host`` clock time is the host's and nothing is counted.

**Who runs.** One vCPU at a time, on the thread that called ``run`` (run_loop.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from xipvm import boards, power
from xipvm.address import format_size
from xipvm.boards.board import Board, FlashBank
from xipvm.console import Console
from xipvm.cpu import core
from xipvm.cpu.arm64 import Arm64
from xipvm.cpu.riscv64 import Riscv64
from xipvm.cpu.vcpu import Vcpu
from xipvm.devices.bus import Bus
from xipvm.devices.flash.cfi01 import PflashCfi01
from xipvm.devices.flash.files import BankBytes, ImageOption, open_banks
from xipvm.devices.htif import Htif
from xipvm.devices.rdma import DmaSpace
from xipvm.errors import BadInput, HostMemoryError, MmError, XipvmError
from xipvm.firmware import Firmware
from xipvm.flash_memory import FlashMemory
from xipvm.image_option import FileMapping, ImageChoice, open_elf, parse_image, parse_mapping
from xipvm.loader.place import Placement, board_for, place
from xipvm.machine_options import (
    HOST_RESERVE,
    check_alias,
    check_arena,
    check_host,
    check_hugetlb,
    check_kinds,
    check_storm,
    flash_options,
    read_dtb,
)
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.mm import Mm
from xipvm.mmu.reclaim import watch_memory
from xipvm.mmu.secondary.choose import make_secondary
from xipvm.mmu.swap import close_swap, swap_of
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE
from xipvm.result import RunResult, Summary
from xipvm.run_loop import RunLoop
from xipvm.trace.funnel import Trace
from xipvm.trace.history import History

if TYPE_CHECKING:
    from xipvm.dirty_log import DirtyLog
    from xipvm.image_memory import ImageMemory
    from xipvm.mmu.secondary.base import SecondaryMmu
    from xipvm.mmu.swap_file import SwapOption
    from xipvm.storm import Storm

_CHUNK = 64 << 10


class Machine:
    """A machine, ready to run. Use it as a context manager, or ``close`` it: it holds images and engines.

    ``host_memory``: bytes of the host's own memory, by default enough for all of RAM; ``swap``: where pages go that do
    not fit, as the command line says it (``"128M"``, ``"swap.img,size=1G"``).
    ``board``: a name or Board, by default the one that runs ``guest``. ``guest``: path of an ELF; without one the
    machine starts at the base of flash bank 0. ``memory``: bytes of RAM. ``flash``: image options, also as the command
    line writes them. ``ram_alias``: a guest-physical address where all of RAM appears a second time, as on boards with
    an uncached window (what devices take out of RAM is not in it). ``hugetlb``: RAM is huge pages of a pool that the
    host has filled before, as with QEMU's memory-backend-file on hugetlbfs. ``pin_sptes``: nobody tells the secondary
    MMU of changes; it holds every page that the guest has used instead, as KVM did before there were notifiers.
    ``dirty_log``: what the guest writes is kept track of, by rings of so many entries, with 0 by bitmaps.
    ``thp``: where the host makes transparent huge pages, of RAM too: ``always``, ``madvise`` (where somebody asks, and
    nobody does for RAM) or ``never``.
    ``trace``: what everything is told to; sinks may be attached before or after. ``storm``: mm operations that come
    while the guest runs.
    ``secondary``: which MMU the guest runs behind (choose.py). ``protocol``: how that is told of changes, ``modern`` or
    ``2008``.
    ``image``: a file system whose files are used in place, ``guest`` being the path of one of them; ``map_files``:
    others of its files that are guest memory (image_memory.py).
    ``devices``: what the machine has beside its board's devices: the DMA engine, by on-demand paging (``odp``) or by
    shared virtual addressing (``sva``).
    Raises BadInput; nothing is left open then.
    """

    def __init__(
        self,
        guest: str | os.PathLike[str] | None = None,
        *,
        board: str | Board | None = None,
        memory: int | None = None,
        smp: int = 1,
        flash: Iterable[str | ImageOption] = (),
        clock: str = "instructions",
        secondary: str = "kvm",
        trace: Trace | None = None,
        console: Console | None = None,
        dtb: str | os.PathLike[str] | None = None,
        ram_alias: int | None = None,
        pin_sptes: bool = False,
        hugetlb: bool = False,
        thp: str = "madvise",
        dirty_log: int | None = None,
        protocol: str = "modern",
        storm: Storm | None = None,
        host_memory: int | None = None,
        swap: str | SwapOption | None = None,
        devices: Iterable[str] = (),
        image: str | ImageChoice | None = None,
        map_files: Iterable[str | FileMapping] = (),
    ) -> None:
        self.devices = frozenset(devices)
        check_kinds(
            clock=clock, protocol=protocol, secondary=secondary, thp=thp, pin_sptes=pin_sptes, devices=self.devices
        )
        if storm is not None:
            check_storm(clock=clock, dirty_log=dirty_log, pin_sptes=pin_sptes, hugetlb=hugetlb)
        choice = parse_image(image) if isinstance(image, str) else image
        mappings = [parse_mapping(text) if isinstance(text, str) else text for text in map_files]
        if mappings and choice is None:
            raise BadInput("files are mapped out of an image, and none is named")
        elf = None if guest is None else open_elf(guest, choice)
        if board is None:
            if elf is None:
                raise BadInput("without a guest the board has to be named")
            board = board_for(elf)
        self.board = boards.get(board) if isinstance(board, str) else board
        self.memory_size = self.board.default_memory if memory is None else memory
        self.board.check(self.memory_size, smp)
        # What a storm forks keeps its own copies.
        self.host_size = self.memory_size * (1 if storm is None else 2) + HOST_RESERVE
        if host_memory is None:
            check_host(self.memory_size, "guest memory")
        else:
            self.host_size = check_arena(host_memory)
        if isinstance(swap, str):
            from xipvm.mmu.swap_file import parse_swap

            swap = parse_swap(swap)
        self._swap = swap
        self.hugetlb = check_hugetlb(self.memory_size, self.host_size) if hugetlb else False
        self.ram_alias = None if ram_alias is None else check_alias(ram_alias, self.board, self.memory_size)
        self.image = elf
        self.placement: Placement | None = None if elf is None else place(elf, self.board, self.memory_size)
        self._choice, self._mappings = choice, mappings
        self._image_guest = None if choice is None or guest is None else os.fspath(guest)
        self.image_memory: ImageMemory | None = None
        """The files of an image that are guest memory."""
        self.dtb_given = None if dtb is None else read_dtb(os.fspath(dtb))
        self.counted = counted = clock == "instructions"
        self.pin_sptes = pin_sptes
        self._kind = secondary
        self.thp = thp
        self._dirty_ring = dirty_log
        self.protocol = protocol
        self.trace = Trace() if trace is None else trace
        self.console = Console() if console is None else console
        self.bus = Bus()
        self.loop = loop = RunLoop(self, self._restart, counted=counted, storm=storm)
        self.clock = loop.clock
        self.trace.clock = loop.virtual if counted else loop.host_time
        self._ended = False
        self._storm = storm
        self._resources = contextlib.ExitStack()
        self._closed = False
        self.seconds = 0.0
        banks = open_banks(flash_options(flash), [bank.size for bank in self.board.flash], board=self.board.name)
        if choice is not None:
            banks = self._without_banks(banks)
        try:
            self._build(banks, smp)
        except BaseException:
            self.close()
            raise

    def _build(self, banks: list[BankBytes], smp: int) -> None:
        board = self.board
        undo = self._resources.callback
        for image in {id(b.image): b.image for b in banks}.values():
            undo(image.close)
        self.host = HostMemory(self.host_size)
        undo(self.host.close)
        undo(close_swap, self.host)
        if self._choice is not None:
            from xipvm.image_memory import ImageMemory

            self.image_memory = ImageMemory(self._choice, self._mappings, self.host, self.trace, self.protocol)
            undo(self.image_memory.close)
        self.reclaim = watch_memory(self.host, self.trace)
        self.history: History | None = None
        """Where a crash report finds the last events, if somebody attached one to ``trace``."""
        self.htif: Htif | None = None
        self.htif_base = 0
        self.mm = Mm(self.host, self.trace, name="mm0", protocol=self.protocol)
        undo(self.mm.exit)
        self.mm.thp.enabled = self.thp
        if self._swap is not None:
            from xipvm.mmu.swap_file import open_swap

            area = open_swap(self._swap)
            undo(area.close)
            swap_of(self.mm).add_area(area)
        self.dirty_log: DirtyLog | None = None
        self.secondary = make_secondary(self._kind, self.mm, self.trace, self.host, pin_sptes=self.pin_sptes)
        undo(self.secondary.destroy)
        if self._dirty_ring is not None:
            from xipvm.dirty_log import DirtyLog

            self.dirty_log = DirtyLog(self.secondary, self._dirty_ring)
        self.secondary.mmio_lookup = self.bus.covers
        flags = MAP_PRIVATE | MAP_ANONYMOUS
        if self.hugetlb:
            self.host.reserve_huge_pages(self.memory_size // HPAGE_SIZE)
            flags |= MAP_HUGETLB
        self.ram = self.mm.mmap(self.memory_size, PROT_READ | PROT_WRITE | PROT_EXEC, flags)
        self.flash: list[FlashMemory] = []
        undo(self._close_flash)
        for number, (bank, data) in enumerate(zip(board.flash, banks, strict=True)):
            device = PflashCfi01(
                number,
                data.image,
                size=bank.size,
                sector=bank.sector,
                offset=data.offset,
                width=bank.width,
                device_width=bank.device_width,
                ids=bank.ids,
                clock=self.clock,
                trace=self.trace,
            )
            self.bus.map(bank.base, bank.size, device)
            self.flash.append(FlashMemory(bank, device, self.host, self.mm, self.secondary, slot=number))
        if self.image_memory is not None:
            ram = board.ram_base, board.ram_base + self.memory_size, "RAM"
            taken = [ram, *(row for row in board.memory_map() if row[2] != "ram")]
            self.image_memory.connect(self.mm, self.secondary, self._image_guest, self.placement, taken)
        self.group = core.EngineGroup(self.host)
        undo(self.group.close)
        isa = core.ARM64 if board.isa == "arm64" else core.RISCV64
        self.vcpus = [
            Vcpu(n, self.group, self.secondary.port(n), self.bus, self.trace, isa=isa, counted=self.counted)
            for n in range(smp)
        ]
        self.secondary.vcpus = list(self.vcpus)
        undo(self.secondary.vcpus.clear)  # engines that are given back are not flushed any more
        for memory in self.flash:
            memory.connect(self.group, self.vcpus)
        self.firmware = Firmware(self)
        for vcpu in self.vcpus:
            vcpu.attach(Arm64(vcpu, self.firmware) if isa == core.ARM64 else Riscv64(vcpu, self.firmware))
        self.dma: DmaSpace | None = None
        self._dma_mmus: Callable[[], Iterable[SecondaryMmu]] = tuple
        if "odp" in self.devices:
            from xipvm.mmu.secondary.odp import OdpContext

            self.dma = context = OdpContext(self.mm, self.ram_hva)
            self._dma_mmus = context.regions.values
            undo(context.close)
        if "sva" in self.devices:
            from xipvm.mmu.secondary.sva import Sva
            from xipvm.mmu.secondary.sva_dma import SvaSpace

            sva = Sva(self.mm)
            undo(sva.destroy)
            self.dma = SvaSpace(sva, self.ram_hva)
            self._dma_mmus = lambda: (sva,)
        self.platform = board.build(self)
        power.map_htif(self)
        power.map_ram(self)
        if self.dirty_log is not None:
            self.dirty_log.start()
        power.program(self)
        try:
            power.power_on(self)
        except MmError:
            if self.mm.oom is None:
                raise
            have = format_size(self.host_size)
            raise HostMemoryError(self.host_size, f"{have} of host memory cannot hold the guest's image") from None
        if self._storm is not None:
            self._storm.bind(self)
            undo(self._storm.end)
            for vcpu in self.vcpus:
                vcpu.on_pause = self.loop.pause

    def _without_banks(self, banks: list[BankBytes]) -> list[BankBytes]:
        """The flash banks that are there beside a guest that is executed out of an image."""
        from xipvm.image_memory import banks_replaced

        replaced = banks_replaced(self.placement)
        kept: list[tuple[FlashBank, BankBytes]] = []
        for bank, data in zip(self.board.flash, banks, strict=True):
            if bank.name not in replaced:
                kept.append((bank, data))
            elif data.image.path is not None:
                for other in banks:
                    other.image.close()
                raise BadInput(f"flash bank {bank.name} is not there: the guest lies in its place, in the image")
            else:
                data.image.close()
        self.board = dataclasses.replace(self.board, flash=tuple(bank for bank, _ in kept))
        return [data for _, data in kept]

    # What boards and devices use

    @property
    def current_vcpu(self) -> int:
        """Number of the vCPU that makes the present device access."""
        return 0 if self.loop.running is None else self.loop.running.index

    def now_at(self, ticks: int) -> int:
        """Virtual time at which the running vCPU's engine stands at ``ticks``."""
        return self.loop.now_at(ticks)

    def request_exit(self, reason: str, status: int) -> None:
        """End the run with ``status``, a 64-bit number, once the guest has left its present block."""
        self.loop.request_exit(reason, status)

    def request_reset(self) -> None:
        """Restart the guest as from power-on; flash keeps its contents."""
        self.loop.request_reset()

    def cpu_is_on(self, cpu: int) -> bool:
        """Whether vCPU ``cpu`` was turned on."""
        return self.vcpus[cpu].on

    def cpu_on(self, cpu: int, entry: int, context: int) -> None:
        """Start a vCPU at ``entry`` with ``context`` in its first register."""
        vcpu = self.vcpus[cpu]
        vcpu.isa.reset(entry, context)
        vcpu.idle = False
        vcpu.on = True

    def cpu_off(self, cpu: int) -> None:
        """Stop a vCPU."""
        self.vcpus[cpu].on = False

    def cpu_suspend(self, cpu: int) -> None:
        """Have a vCPU wait for an interrupt."""
        self.vcpus[cpu].idle = True

    def add_service(self, poll: Callable[[], object], close: Callable[[], object]) -> None:
        """Call ``poll`` again and again between slices of the guest, while it runs; ``close`` before memory goes."""
        self.loop.services.append(poll)
        self._resources.callback(close)

    def remove_service(self, poll: Callable[[], object]) -> None:
        """Nobody calls ``poll`` any more, which was added; its ``close`` still comes, and has nothing to do."""
        self.loop.services.remove(poll)

    # Building

    def write_ram(self, gpa: int, data: bytes) -> None:
        """Store into RAM from the host side. Raises BadInput outside of it."""
        offset = gpa - self.board.ram_base
        if offset < 0 or offset + len(data) > self.memory_size:
            raise BadInput(f"{len(data)} bytes at {gpa:#x} do not fit in RAM")
        # A write holds its pages until all are there, and the host may have fewer than there are.
        for at in range(0, len(data), _CHUNK):
            self.mm.write(self.ram + offset + at, data[at : at + _CHUNK])

    def secondaries(self) -> list[SecondaryMmu]:
        """Every secondary MMU of its mm: the guest's, then those of devices."""
        return [self.secondary, *self._dma_mmus()]

    def ram_hva(self, gpa: int, size: int) -> int | None:
        """Where the host process has bytes of RAM, None when they are not all RAM."""
        offset = gpa - self.board.ram_base
        return self.ram + offset if offset >= 0 and offset + size <= self.memory_size else None

    def read_physical(self, gpa: int, size: int) -> bytes | None:
        """Bytes of RAM or flash as the guest would read them, None where neither is."""
        offset = gpa - self.board.ram_base
        if self.ram_alias is not None and gpa >= self.ram_alias:
            offset = gpa - self.ram_alias
        if offset >= 0 and offset + size <= self.memory_size:
            data = self.mm.read(self.ram + offset, size)
            if self.htif is not None:
                data = self.htif.over(self.htif_base, gpa, data)
            return data
        for memory in self.flash:
            if memory.contains(gpa) and memory.contains(gpa + size - 1):
                return memory.read(gpa, size)
        return None if self.image_memory is None else self.image_memory.read(self.mm, gpa, size)

    def close(self) -> None:
        """Give back engines, images and memory. May be called twice; while it runs, that is an XipvmError."""
        if self._closed:
            return
        if self.loop.began:
            raise XipvmError("a machine cannot be closed while it runs")
        self._closed = True
        self._resources.close()

    def _close_flash(self) -> None:
        for memory in self.flash:
            memory.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Running

    def run(
        self, *, timeout: float | None = None, max_instructions: int | None = None, until: str | None = None
    ) -> RunResult:
        """Run until the guest ends or a limit is reached. ``timeout`` in seconds of wall time;
        ``max_instructions`` ends the run at the first block boundary at or behind so many.

        ``until``: end with status 0 once all input is used and the console prints this text after it. After a limit,
        a signal or ``until`` the machine can be run on; after the guest's end that is an XipvmError, unless it was
        told to restart (``request_reset``).
        """
        loop = self.loop
        if self._closed or (self._ended and not loop.reset):
            raise XipvmError("this machine's guest has ended; reset it, or make another machine")
        if loop.began:
            raise XipvmError("this machine runs already")
        for name, value in (("timeout", timeout), ("max_instructions", max_instructions)):
            if value is not None and not value > 0:
                raise BadInput(f"{name} is {value}; a limit is above 0")
        if max_instructions is not None and not self.counted:
            raise BadInput("an instruction limit needs the instructions clock")
        if until is not None:
            self.console.watch(until, lambda: self.request_exit("until", 0))
        self.console.on_quit = lambda: self.request_exit("quit", 0)
        trace = self.trace
        loop.began = time.monotonic()
        try:
            for vcpu in self.vcpus:
                vcpu.record(trace.on)
            if trace.on:
                self._announce()
            result = loop.run(timeout, max_instructions)
        finally:
            elapsed = time.monotonic() - loop.began
            loop.began = 0.0
            self.seconds += elapsed
            if until is not None:
                self.console.unwatch()
            if not self.counted:
                loop.virtual.base += int(elapsed * 1e9)
            self.console.flush()
        self._ended = result.reason in ("exit", "crash", "oom")
        result.summary = self.summary()
        if trace.on:
            trace.emit("machine_end", reason=result.reason, status=result.status)
        if result.reason != "interrupted":
            for number in core.take_signals() - {core.SIGALRM_NUMBER}:
                signal.raise_signal(number)  # it came too late to end this run, and is not the next one's
        return result

    def _announce(self) -> None:
        self.trace.emit(
            "machine_start",
            board=self.board.name,
            memory=self.memory_size,
            smp=len(self.vcpus),
            clock="instructions" if self.counted else "host",
            guest="" if self.image is None else os.path.basename(self.image.path),
        )

    def _restart(self) -> None:
        if self.trace.on:
            self.trace.emit("machine_reset", board=self.board.name)
        for vcpu in self.vcpus:
            vcpu.on = vcpu.idle = vcpu.irq = False
            vcpu.last_exception = vcpu.fault_address = None
            vcpu.flush_tlb("reset")
        if self.secondary.shadow is not None:
            self.secondary.shadow.vcpu_reset()
        self.platform.reset()
        for memory in self.flash:
            memory.device.reset()
        power.power_on(self)

    def summary(self) -> Summary:
        """What the machine did so far."""
        swap, image = self.mm.rmap.swap, self.image_memory
        return Summary(
            instructions=self.loop.instructions() if self.counted else None,
            seconds=self.seconds,
            guest_faults=sum(vcpu.faults for vcpu in self.vcpus),
            invalidations=self.secondary.invalidations,
            tlb_flushes=sum(vcpu.engine.flushes for vcpu in self.vcpus),
            flash_programs=sum(memory.device.programs for memory in self.flash),
            flash_erases=sum(memory.device.erases for memory in self.flash),
            reclaimed=self.reclaim.lru.reclaimed,
            dirty_pages=None if self.dirty_log is None else self.dirty_log.collect(),
            swap_ins=0 if swap is None else swap.ins,
            swap_outs=0 if swap is None else swap.outs,
            swap_errors=0 if swap is None else swap.errors,
            image_pages=None if image is None or self._image_guest is None else (image.in_place, image.copied),
        )


def run(
    guest: str | os.PathLike[str],
    *,
    board: str | Board | None = None,
    memory: int | None = None,
    smp: int = 1,
    flash: Iterable[str | ImageOption] = (),
    clock: str = "instructions",
    secondary: str = "kvm",
    stdin: bytes = b"",
    trace: Trace | None = None,
    timeout: float | None = None,
    max_instructions: int | None = None,
    until: str | None = None,
    storm: Storm | None = None,
    host_memory: int | None = None,
    swap: str | SwapOption | None = None,
    pin_sptes: bool = False,
    hugetlb: bool = False,
    thp: str = "madvise",
    protocol: str = "modern",
    dirty_log: int | None = None,
    devices: Iterable[str] = (),
    image: str | ImageChoice | None = None,
    map_files: Iterable[str | FileMapping] = (),
) -> tuple[RunResult, bytes]:
    """Run a guest to its end; returns how that was and what the guest printed.

    ``flash`` takes option strings as the command line does (``"flash.img,bank=1,snapshot=on"``); ``stdin`` is the
    console input, given as the guest reads it. Raises BadInput; a guest that crashes is a result, not an exception.
    """
    output = io.BytesIO()
    with Machine(
        guest,
        board=board,
        memory=memory,
        smp=smp,
        flash=flash,
        clock=clock,
        secondary=secondary,
        trace=trace,
        console=Console(output, stdin),
        storm=storm,
        host_memory=host_memory,
        swap=swap,
        pin_sptes=pin_sptes,
        hugetlb=hugetlb,
        thp=thp,
        protocol=protocol,
        dirty_log=dirty_log,
        devices=devices,
        image=image,
        map_files=map_files,
    ) as machine:
        result = machine.run(timeout=timeout, max_instructions=max_instructions, until=until)
    return result, output.getvalue()
