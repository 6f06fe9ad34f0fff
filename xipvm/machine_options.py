"""What a machine can be made of: what was asked for, looked at before anything is made.

Everything here raises BadInput, HostMemoryError where the host is too small, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, format_size
from xipvm.boards.board import Board
from xipvm.devices.flash.files import ImageOption, parse_option
from xipvm.errors import BadInput, HostMemoryError, os_reason
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.secondary.choose import check_secondary
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.thp import ENABLED as THP_ENABLED
from xipvm.notifier import PROTOCOLS

#: Frames beside guest memory: the zero page, and room for what the host process maps of its own.
HOST_RESERVE = 16 << 20
#: The least host memory that a machine can do with: below, one access of the guest may need more than there is.
HOST_MINIMUM = 1 << 20
#: The largest device tree that a guest is given, bytes.
DTB_LIMIT = 2 << 20

CLOCKS = ("instructions", "host")
DEVICES = ("odp", "sva")


def check_kinds(
    *, clock: str, protocol: str, secondary: str, thp: str, pin_sptes: bool, devices: frozenset[str]
) -> None:
    """Everything that has a name is there, and goes with the rest."""
    if clock not in CLOCKS:
        raise BadInput(f"no clock is called {clock!r}; known are {', '.join(CLOCKS)}")
    if protocol not in PROTOCOLS:
        raise BadInput(f"no notifier protocol is called {protocol!r}; known are {', '.join(PROTOCOLS)}")
    if thp not in THP_ENABLED:
        raise BadInput(f"transparent huge pages are enabled {', '.join(THP_ENABLED)}, not {thp!r}")
    check_secondary(secondary, pin_sptes=pin_sptes)
    unknown = devices - frozenset(DEVICES)
    if unknown:
        raise BadInput(f"no device is called {min(unknown)!r}; known are {', '.join(DEVICES)}")
    if devices and protocol == "2008":
        raise BadInput(f"{', '.join(sorted(devices))} cannot work with the 2008 protocol")
    if len(devices) > 1:
        raise BadInput(f"there is one DMA engine: {' or '.join(sorted(devices))}, not both")


def check_storm(*, clock: str, dirty_log: int | None, pin_sptes: bool, hugetlb: bool) -> None:
    """A storm can rage on such a machine."""
    if clock != "instructions":
        raise BadInput("a storm needs the instructions clock")
    if dirty_log is not None:
        raise BadInput("a storm turns dirty logs on and off, and reads them, itself")
    if pin_sptes:
        raise BadInput("a storm has the host copy pages, which a guest with pinned ones does not see")
    if hugetlb:
        raise BadInput("a storm forks children, for whose copies a pool of huge pages has no room")


def check_alias(base: int, board: Board, size: int) -> int:
    """``base`` when RAM can appear there, too."""
    limit = GFN_LIMIT << PAGE_SHIFT
    if base < 0 or base % PAGE_SIZE or base + size > limit:
        raise BadInput(f"RAM cannot appear at {base:#x}: an alias begins on a page and ends below {limit:#x}")
    taken = [row for row in board.memory_map() if row[2] != "ram"]
    taken += [(region.base, region.end, region.name) for region in board.optional]
    for first, end, what in [*taken, (board.ram_base, board.ram_base + size, "ram")]:
        if base < end and first < base + size:
            raise BadInput(f"RAM cannot appear at {base:#x}: {what} is at {first:#x} to {end:#x}")
    return base


def check_hugetlb(memory: int, host: int) -> bool:
    """True when ``memory`` bytes of RAM can be huge pages out of ``host`` bytes."""
    if memory % HPAGE_SIZE:
        raise BadInput(f"{format_size(memory)} of RAM is not made of huge pages: give a multiple of 2 MiB")
    if memory + HPAGE_SIZE > host:
        have, want = format_size(host), format_size(memory)
        raise HostMemoryError(host, f"{have} of host memory cannot hold {want} in huge pages")
    return True


def check_host(memory: int, what: str) -> None:
    """The real host has ``memory`` bytes for ``what``."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory > have:
        raise HostMemoryError(memory, f"{format_size(memory)} of {what}: the host has {have >> 20} MiB")


def check_arena(size: int) -> int:
    """``size`` when the model's host can have so much memory."""
    if size < HOST_MINIMUM or size % PAGE_SIZE:
        least = format_size(HOST_MINIMUM)
        raise HostMemoryError(size, f"host memory of {format_size(size)}: give {least} or more, whole pages of 4 KiB")
    check_host(size, "host memory")
    return size


def flash_options(flash: Iterable[str | ImageOption]) -> list[ImageOption]:
    """The options, those that are text parsed."""
    if isinstance(flash, str):
        raise BadInput(f"flash takes a list of image options, not {flash!r} alone")
    return [parse_option(option) if isinstance(option, str) else option for option in flash]


def read_dtb(path: str) -> bytes:
    """A device tree from a file, as long as it says it is."""
    try:
        with open(path, "rb") as file:
            data = file.read(DTB_LIMIT + 1)
    except OSError as error:
        raise BadInput(f"{path}: {os_reason(error)}") from None
    if data[:4] != b"\xd0\x0d\xfe\xed":
        raise BadInput(f"{path}: is not a device tree (DTB)")
    size = int.from_bytes(data[4:8], "big")
    if size > DTB_LIMIT:
        raise BadInput(f"{path}: a device tree of {size} bytes; {format_size(DTB_LIMIT)} are the limit")
    if len(data) < max(size, 40):  # the header alone
        raise BadInput(f"{path}: is cut short: {len(data)} bytes of {max(size, 40)}")
    return data[:size]
