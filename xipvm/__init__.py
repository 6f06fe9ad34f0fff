"""Executes guest ELF binaries in place from emulated flash, through a secondary MMU kept coherent by MMU notifiers.

The public surface is what this module lists, and for tests and one's own secondary MMUs :mod:`xipvm.testing`; the
modules behind them may be read and used, but change without notice. Everything is imported on first use, so that
``import xipvm`` costs nothing.
"""

from __future__ import annotations

import os
from importlib.machinery import EXTENSION_SUFFIXES
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xipvm.boards import Board
    from xipvm.check import Oracle, Violation
    from xipvm.console import Console
    from xipvm.devices.flash.files import ImageOption
    from xipvm.errors import (
        BadInput,
        DeadlockError,
        FileError,
        GuestError,
        LockError,
        MmError,
        ProtocolUnsupported,
        XipvmError,
    )
    from xipvm.image_option import FileMapping, ImageChoice
    from xipvm.machine import Machine, run
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.secondary.dmirror import Dmirror
    from xipvm.mmu.secondary.xpmem import Xpmem
    from xipvm.mmu.swap_file import SwapOption
    from xipvm.result import RunResult, Summary
    from xipvm.storm import Storm
    from xipvm.trace import Event, Trace
    from xipvm.trace.reader import TraceReader
    from xipvm.trace.recorder import Recorder
    from xipvm.xip.volume import Volume, open_volume
    from xipvm.xpmem.node import XpmemNode

__all__ = [
    "BadInput",
    "Board",
    "Console",
    "DeadlockError",
    "Dmirror",
    "Event",
    "FileError",
    "FileMapping",
    "GuestError",
    "HostMemory",
    "ImageChoice",
    "ImageOption",
    "LockError",
    "Machine",
    "Mm",
    "MmError",
    "Oracle",
    "ProtocolUnsupported",
    "Recorder",
    "RunResult",
    "Storm",
    "Summary",
    "SwapOption",
    "Trace",
    "TraceReader",
    "Violation",
    "Volume",
    "XipvmError",
    "Xpmem",
    "XpmemNode",
    "open_volume",
    "run",
]

_HOMES = {
    "BadInput": "xipvm.errors",
    "Board": "xipvm.boards",
    "Console": "xipvm.console",
    "DeadlockError": "xipvm.errors",
    "Dmirror": "xipvm.mmu.secondary.dmirror",
    "Event": "xipvm.trace",
    "FileError": "xipvm.errors",
    "FileMapping": "xipvm.image_option",
    "GuestError": "xipvm.errors",
    "HostMemory": "xipvm.mmu.frames",
    "ImageChoice": "xipvm.image_option",
    "ImageOption": "xipvm.devices.flash.files",
    "LockError": "xipvm.errors",
    "Machine": "xipvm.machine",
    "Mm": "xipvm.mmu.mm",
    "MmError": "xipvm.errors",
    "Oracle": "xipvm.check",
    "ProtocolUnsupported": "xipvm.errors",
    "Recorder": "xipvm.trace.recorder",
    "RunResult": "xipvm.result",
    "Storm": "xipvm.storm",
    "Summary": "xipvm.result",
    "SwapOption": "xipvm.mmu.swap_file",
    "Trace": "xipvm.trace",
    "TraceReader": "xipvm.trace.reader",
    "Violation": "xipvm.check",
    "Volume": "xipvm.xip.volume",
    "XipvmError": "xipvm.errors",
    "Xpmem": "xipvm.mmu.secondary.xpmem",
    "XpmemNode": "xipvm.xpmem.node",
    "open_volume": "xipvm.xip.volume",
    "run": "xipvm.machine",
}


def _check_built(package: str) -> None:
    """That the native parts in the directory ``package`` are there, going by one of them. Raises ImportError."""
    native = os.path.join(package, "mmu", "frames")
    if not any(os.path.exists(native + suffix) for suffix in EXTENSION_SUFFIXES) and os.path.exists(native + ".pyx"):
        raise ImportError(
            f"these are xipvm's sources, and its native parts are not built for this Python: run 'pip install -e .' in "
            f"{os.path.dirname(package)}, or work in another directory if xipvm is installed"
        )


_check_built(os.path.dirname(__file__))


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'xipvm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)
