"""The other side: raw Unicorn, QEMU and the host's kernel, running the same guests or doing the same thing.

Raw Unicorn is what one gets by writing the twenty obvious lines: the ``unicorn`` package, the default TLB mode
(UC_TLB_CPU), a Cortex-A57, flash and RAM mapped once each, readable, writable and executable, and a page of memory
where the UART is, so that what the guest prints goes nowhere. The only hook is the one that ends the run.

QEMU runs the guest as a user would start it, from a pflash image of the board's size. Its time is that of the whole
process: nothing is subtracted.

What computes is measured in CPU time, which other processes on the machine disturb least.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import unicorn
from elftools.elf.elffile import ELFFile
from unicorn import arm64_const

from benchmarks.harness import MissingPeerError

FLASH, FLASH_SIZE = 0, 64 << 20
RAM, RAM_SIZE = 0x4000_0000, 128 << 20
UART = 0x0900_0000
PSCI_SYSTEM_OFF = 0x8400_0008
RAW_UNICORN = (
    "raw Unicorn: the unicorn package, UC_TLB_CPU (its default), Cortex-A57, flash and RAM one RWX mapping each, "
    "the same ELF, no hook but the one that ends the run"
)
_NOWHERE = 0x7FFF_F000
_PATIENCE = 120.0
_MADV_PAGEOUT = 21
_SYS_MOVE_PAGES = 279
_MPOL_MF_MOVE = 2

_QEMU = "qemu-system-aarch64"
_BOARD = ("-M", "virt", "-cpu", "cortex-a57", "-m", "128", "-nic", "none", "-nographic")


def segments(elf: Path) -> Iterator[tuple[int, bytes]]:
    """Physical address and bytes of each loaded segment."""
    with elf.open("rb") as file:
        for segment in ELFFile(file).iter_segments("PT_LOAD"):
            if segment["p_filesz"]:
                yield segment["p_paddr"], segment.data()


class RawUnicorn:
    """One engine with ``elf`` loaded."""

    def __init__(self, elf: Path) -> None:
        engine: Any = unicorn  # it is not typed
        self._uc = engine.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._uc.ctl_set_cpu_model(arm64_const.UC_CPU_ARM64_A57)
        for base, size in ((FLASH, FLASH_SIZE), (RAM, RAM_SIZE), (UART, 0x1000)):
            self._uc.mem_map(base, size, unicorn.UC_PROT_ALL)
        for address, data in segments(elf):
            self._uc.mem_write(address, data)
        self._uc.hook_add(unicorn.UC_HOOK_INTR, lambda uc, number, user: uc.emu_stop())

    def timed(self) -> float:
        """CPU seconds from reset to the guest's SYSTEM_OFF; may be called again. Raises RuntimeError otherwise."""
        start = time.process_time()
        self._uc.emu_start(FLASH, _NOWHERE)
        seconds = time.process_time() - start
        if self._uc.reg_read(arm64_const.UC_ARM64_REG_X0) != PSCI_SYSTEM_OFF:
            raise RuntimeError("raw Unicorn: the guest did not end by SYSTEM_OFF")
        return seconds


def raw_once(elf: Path) -> float:
    """CPU seconds that a new raw engine runs ``elf``."""
    return RawUnicorn(elf).timed()


class Qemu:
    """qemu-system-aarch64 with ``elf`` in flash bank 0; ``folder`` gets the image. Raises MissingPeerError."""

    def __init__(self, elf: Path, folder: Path) -> None:
        _require_qemu()
        image = folder / f"{elf.name}.pflash"
        with image.open("wb") as file:
            file.truncate(FLASH_SIZE)
            for address, data in segments(elf):
                file.seek(address - FLASH)
                file.write(data)
        drive = f"if=pflash,unit=0,format=raw,file={image}"
        self._command = [_QEMU, *_BOARD, "-semihosting", "-drive", drive]

    def timed(self) -> float:
        """Seconds of the whole process. Raises CalledProcessError when the guest does not report success."""
        start = time.perf_counter()
        subprocess.run(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True, timeout=_PATIENCE
        )
        return time.perf_counter() - start

    def cpu(self) -> float:
        """The same in CPU seconds of all its threads."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.timed()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def qemu_firmware(bios: Path) -> list[str]:
    """The command that starts ``bios`` on the same board. Raises MissingPeerError."""
    _require_qemu()
    return [_QEMU, *_BOARD, "-bios", str(bios)]


def qemu_version() -> str | None:
    """What QEMU calls itself, None where there is none."""
    if shutil.which(_QEMU) is None:
        return None
    said = subprocess.run([_QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


class NotAllowedError(Exception):
    """The host's kernel does not do this here; the message says why."""


def _require_qemu() -> None:
    if shutil.which(_QEMU) is None:
        raise MissingPeerError(f"{_QEMU} is not installed")


def kernel_supply(size: int) -> float:
    """CPU seconds in which the host's kernel supplies ``size`` bytes of anonymous memory, as the arena is."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = time.process_time()
        for offset in range(0, size, mmap.PAGESIZE):
            memory[offset] = 1
        return time.process_time() - start


@contextmanager
def _touched(size: int) -> Iterator[int]:
    """The address of ``size`` bytes of anonymous memory, every page of which was written, without huge pages."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, size, mmap.PAGESIZE):
            memory[offset] = 1
        anchor = ctypes.c_char.from_buffer(memory)
        try:
            yield ctypes.addressof(anchor)
        finally:
            del anchor  # or the mapping could not be closed


def _libc(name: str, *types: type) -> Callable[..., int]:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.argtypes = types
    return cast(Callable[..., int], function)


def _call(name: str, address: int, size: int, *arguments: int) -> float:
    """CPU seconds of a system call on ``[address, address + size)``. Raises OSError."""
    function = _libc(name, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * len(arguments))
    start = time.process_time()
    failed = function(address, size, *arguments)
    seconds = time.process_time() - start
    if failed:
        raise OSError(ctypes.get_errno(), name)
    return seconds


def kernel_dontneed(size: int) -> float:
    """CPU seconds of madvise(MADV_DONTNEED) by the host's kernel over ``size`` bytes of touched anonymous memory."""
    with _touched(size) as address:
        return _call("madvise", address, size, mmap.MADV_DONTNEED)


def kernel_mprotect(size: int) -> float:
    """The same of mprotect(PROT_READ)."""
    with _touched(size) as address:
        try:
            return _call("mprotect", address, size, mmap.PROT_READ)
        finally:
            _call("mprotect", address, size, mmap.PROT_READ | mmap.PROT_WRITE)


def kernel_munmap(size: int) -> float:
    """The same of munmap. The memory is made here, so that nobody unmaps it again."""
    place = ctypes.CDLL(None, use_errno=True).mmap
    place.restype = ctypes.c_void_p
    place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = place(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    _call("madvise", address, size, mmap.MADV_NOHUGEPAGE)
    for offset in range(0, size, mmap.PAGESIZE):
        ctypes.memset(address + offset, 1, 1)
    return _call("munmap", address, size)


def kernel_fork(size: int) -> float:
    """The same of fork: what it takes longer with that memory than without it. The child ends at once."""
    with _touched(size):
        whole = _forked()
    return max(whole - _forked(), 0.0)


def _forked() -> float:
    start = time.process_time()
    child = os.fork()
    if not child:
        os._exit(0)
    seconds = time.process_time() - start
    os.waitpid(child, 0)
    return seconds


def kernel_pageout(size: int) -> float:
    """The same of madvise(MADV_PAGEOUT). Raises NotAllowedError where nothing is swapped out."""
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        raise NotAllowedError("not allowed here, there is no swap")
    with _touched(size) as address:
        return _call("madvise", address, size, _MADV_PAGEOUT)


def kernel_move_pages(size: int) -> float:
    """The same of move_pages to another NUMA node. Raises NotAllowedError where there is none."""
    nodes = sorted(int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        raise NotAllowedError("not allowed here, there is one NUMA node")
    count = size // mmap.PAGESIZE
    with _touched(size) as address:
        pages = (ctypes.c_void_p * count)(*range(address, address + size, mmap.PAGESIZE))
        wanted, status = (ctypes.c_int * count)(*[nodes[1]] * count), (ctypes.c_int * count)()
        function = ctypes.CDLL(None, use_errno=True).syscall
        start = time.process_time()
        failed = function(_SYS_MOVE_PAGES, 0, ctypes.c_ulong(count), pages, wanted, status, _MPOL_MF_MOVE)
        seconds = time.process_time() - start
    if failed < 0:
        raise NotAllowedError(f"not allowed here, {os.strerror(ctypes.get_errno())}")
    return seconds
