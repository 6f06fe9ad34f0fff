"""Executes guest ELF binaries in place from emulated flash, through a secondary MMU kept coherent by MMU notifiers.

The public surface is what this module lists; the modules behind it may be read and used, but
change without notice. Everything is imported on first use, so that ``import xipvm`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xipvm.boards import Board
    from xipvm.check import Oracle, Violation
    from xipvm.console import Console
    from xipvm.devices.flash.files import ImageOption
    from xipvm.errors import BadInput, DeadlockError, GuestError, LockError, MmError, ProtocolUnsupported, XipvmError
    from xipvm.machine import Machine, run
    from xipvm.mmu.mm import Mm
    from xipvm.result import RunResult, Summary
    from xipvm.storm import Storm
    from xipvm.trace import Event, Trace
    from xipvm.trace.reader import TraceReader
    from xipvm.trace.recorder import Recorder

__all__ = [
    "BadInput",
    "Board",
    "Console",
    "DeadlockError",
    "Event",
    "GuestError",
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
    "Trace",
    "TraceReader",
    "Violation",
    "XipvmError",
    "run",
]

_HOMES = {
    "BadInput": "xipvm.errors",
    "Board": "xipvm.boards",
    "Console": "xipvm.console",
    "DeadlockError": "xipvm.errors",
    "Event": "xipvm.trace",
    "GuestError": "xipvm.errors",
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
    "Trace": "xipvm.trace",
    "TraceReader": "xipvm.trace.reader",
    "Violation": "xipvm.check",
    "XipvmError": "xipvm.errors",
    "run": "xipvm.machine",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'xipvm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)
