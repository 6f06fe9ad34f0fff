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
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def kernel_dontneed(size: int) -> float:
    """CPU seconds of madvise(MADV_DONTNEED) by the host's kernel over ``size`` bytes of touched anonymous memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, size, mmap.PAGESIZE):
            memory[offset] = 1
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        start = time.process_time()
        failed = libc.madvise(address, size, mmap.MADV_DONTNEED)
        seconds = time.process_time() - start
        del anchor  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "madvise")
    return seconds
