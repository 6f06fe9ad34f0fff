"""PSCI, the Arm power-state coordination interface (ARM DEN 0022), version 1.0, as firmware would answer it.

A function of the caller's registers and of the machine's ``CpuPower``; which instruction made the call is
the CPU's matter. CPU_SUSPEND is a standby state only: it waits for an interrupt and keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

VERSION = 0x8400_0000
CPU_SUSPEND = 0x8400_0001
CPU_OFF = 0x8400_0002
CPU_ON = 0x8400_0003
AFFINITY_INFO = 0x8400_0004
MIGRATE_INFO_TYPE = 0x8400_0006
SYSTEM_OFF = 0x8400_0008
SYSTEM_RESET = 0x8400_0009
FEATURES = 0x8400_000A
SMC64 = 0x4000_0000
"""Added to the numbers of functions that take addresses, where the caller uses 64-bit arguments."""

SUCCESS = 0
NOT_SUPPORTED = -1
INVALID_PARAMETERS = -2
ALREADY_ON = -4
ON, OFF = 0, 1
TRUSTED_OS_NOT_PRESENT = 2

_VERSION_1_0 = 1 << 16
_AFFINITY = 0xFF_00FF_FFFF
_POWER_DOWN = 1 << 16
_WITH_ADDRESSES = (CPU_SUSPEND, CPU_ON, AFFINITY_INFO)
_FUNCTIONS = frozenset(
    {VERSION, CPU_OFF, MIGRATE_INFO_TYPE, SYSTEM_OFF, SYSTEM_RESET, FEATURES}
    | {*_WITH_ADDRESSES}
    | {number | SMC64 for number in _WITH_ADDRESSES}
)


class CpuPower(Protocol):
    """What PSCI does to the CPUs, by number."""

    def cpu_is_on(self, cpu: int) -> bool:
        """Whether ``cpu`` runs or waits, and was not turned off."""

    def cpu_on(self, cpu: int, entry: int, context: int) -> None:
        """Start ``cpu`` at ``entry`` in the exception level of the caller, with ``context`` in its first register."""

    def cpu_off(self, cpu: int) -> None:
        """Stop ``cpu`` until it is turned on again."""

    def cpu_suspend(self, cpu: int) -> None:
        """Have ``cpu`` wait for an interrupt after the call, as WFI does."""


class Psci:
    """The firmware of a machine with ``cpus`` CPUs."""

    def __init__(self, cpus: int, power: CpuPower, exit: Callable[[str, int], None], reset: Callable[[], None]) -> None:
        self._cpus = cpus
        self._power = power
        self._exit = exit
        self._reset = reset

    def call(self, caller: int, arguments: Sequence[int]) -> int | None:
        """CPU ``caller``'s call with its registers 0 to 3; the answer for register 0, unsigned.

        None: the caller does not go on (CPU_OFF, SYSTEM_OFF, SYSTEM_RESET).
        """
        answer = self._call(caller, *arguments[:4])
        return None if answer is None else answer & 0xFFFF_FFFF_FFFF_FFFF

    def _call(self, caller: int, number: int, first: int, second: int, third: int) -> int | None:
        number &= 0xFFFF_FFFF
        if number not in _FUNCTIONS:
            return NOT_SUPPORTED
        if not number & SMC64:
            first, second, third = (value & 0xFFFF_FFFF for value in (first, second, third))
        number &= ~SMC64
        if number == VERSION:
            return _VERSION_1_0
        if number == CPU_SUSPEND:
            if first & _POWER_DOWN:
                return INVALID_PARAMETERS
            self._power.cpu_suspend(caller)
            return SUCCESS
        if number == CPU_OFF:
            self._power.cpu_off(caller)
            return None
        if number == CPU_ON:
            return self._turn_on(first, second, third)
        if number == AFFINITY_INFO:
            cpu = self._cpu(first)
            if cpu is None or second != 0:
                return INVALID_PARAMETERS
            return ON if self._power.cpu_is_on(cpu) else OFF
        if number == MIGRATE_INFO_TYPE:
            return TRUSTED_OS_NOT_PRESENT
        if number == FEATURES:
            return SUCCESS if first & 0xFFFF_FFFF in _FUNCTIONS else NOT_SUPPORTED
        if number == SYSTEM_OFF:
            self._exit("psci system_off", 0)
        else:
            self._reset()
        return None

    def _turn_on(self, target: int, entry: int, context: int) -> int:
        cpu = self._cpu(target)
        if cpu is None:
            return INVALID_PARAMETERS
        if self._power.cpu_is_on(cpu):
            return ALREADY_ON
        self._power.cpu_on(cpu, entry, context)
        return SUCCESS

    def _cpu(self, affinity: int) -> int | None:
        """The number of the CPU whose MPIDR has these affinity fields: they count in Aff0."""
        affinity &= _AFFINITY
        return affinity if affinity < self._cpus else None
