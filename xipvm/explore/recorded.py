"""Recorded sequences of a real kernel as scenarios: what happened in one order there, in every other order here.

A file of the conformance suite (docs/conformance.md) has steps. Those that set up happen first, in order. Then the
others are given to those who do them, each in the recorded order: everything of the host to the actor ``host``, a VM's
accesses to its vCPU; and beside each such vCPU there is another one that reads what it touches. What a step saw is not
compared, as it depends on the order; but no guest may ever read from a page that is free, and the oracle and the checks
at the end of every scene hold in any order.

Of an access to many pages, which take part in the set-up whole, only the ends and the middle are made beside others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from xipvm.conform.scenario import Scenario as Recorded
from xipvm.conform.scenario import Step, fill_values, load
from xipvm.conform.steps import execute
from xipvm.conform.world import MEMORY, UnsupportedError, World
from xipvm.errors import BadInput
from xipvm.explore.scene import Scenario, Scene
from xipvm.explore.scripted import GuestAccessError, ScriptedVcpu

POISON: Final = 0x6B
"""What a free frame is filled with (Linux's POISON_FREE)."""
_FEW: Final = 3
_GUEST: Final = ("guest_read", "guest_write")
_BESIDE: Final = ("guest_spin_start", "guest_spin_end", "guest_loop_start", "guest_loop_stop", "wait_damon")
"""A vCPU that was inside the guest all the time: what it did depended on the clock."""
_HUGE_MEMORY: Final = MEMORY
_MEMORY: Final = 16 << 20

Access = tuple[int, int | None]
"""Guest frame, and what is written there, None for a read."""


def recorded(path: str) -> Scenario:
    """The scenario of the file ``path``. Raises BadInput for one that is none, or depends on the clock."""
    sequence = load(path)
    clocked = sorted({step.op for step in sequence.steps if step.op in _BESIDE})
    if clocked:
        raise BadInput(f"{path}: {', '.join(clocked)}: what happened depended on the clock, and cannot be reordered")

    def furnish(scene: Scene) -> None:
        _Stage(scene, sequence)

    memory = _HUGE_MEMORY if any(_is_large(step) for step in sequence.steps) else _MEMORY
    return Scenario(Path(path).stem, furnish, sequence.title, ("modern",), memory)


def _is_large(step: Step) -> bool:
    return step.op == "hugetlb_reserve" or step.args.get("advice") in ("HUGEPAGE", "COLLAPSE")


class _Stage:
    """One run of ``sequence`` in ``scene``: everything is set up, and the actors are there."""

    def __init__(self, scene: Scene, sequence: Recorded) -> None:
        self._scene = scene
        self._world = World(scene.host, scene.trace)
        self._vcpus: dict[str, tuple[ScriptedVcpu, ScriptedVcpu]] = {}
        scene.undo(self._world.close)
        host: list[Step] = []
        guests: dict[str, list[Access]] = {}
        for step in sequence.steps:
            vm = step.args.get("vm", "vm1")
            if step.op not in _GUEST:
                if step.setup:
                    self._do(step)
                else:
                    host.append(step)
            elif step.setup:
                for gfn, value in _accesses(step):
                    _access(self._vcpus[vm][0], gfn, value)
            else:
                guests.setdefault(vm, []).extend(_few(list(_accesses(step))))
        scene.actor("host", self._all, host)
        for vm, accesses in guests.items():
            if vm in self._vcpus:
                first, second = self._vcpus[vm]
                scene.actor(f"{vm}.vcpu0", _run, first, accesses)
                scene.actor(f"{vm}.vcpu1", _run, second, [(gfn, None) for gfn, _ in accesses])

    def _all(self, steps: list[Step]) -> None:
        for step in steps:
            self._do(step)

    def _do(self, step: Step) -> None:
        try:
            execute(self._world, step)
        except UnsupportedError as error:
            raise BadInput(f"{step}: there is no {error.op}") from None
        if step.op == "vm_create":
            name = step.args["vm"]
            vm = self._world.vms[name]
            self._scene.mmus.append(vm.kvm)
            self._scene.undo(vm.close)
            self._vcpus[name] = self._scene.vcpu(vm.kvm), self._scene.vcpu(vm.kvm)


def _accesses(step: Step) -> Iterator[Access]:
    """What a guest step touches, in order."""
    args = step.args
    if "fill" in args:
        yield from fill_values(args["fill"])
    elif "range" in args:
        span = args["range"]
        for gfn in range(span["start"], span["end"], span.get("step", 1)):
            yield gfn, None
    else:
        yield args["gfn"], int(args["value"], 16) if "value" in args else None


def _few(accesses: list[Access]) -> list[Access]:
    if len(accesses) <= _FEW:
        return accesses
    return [accesses[0], accesses[len(accesses) // 2], accesses[-1]]


def _run(vcpu: ScriptedVcpu, accesses: list[Access]) -> None:
    for gfn, value in accesses:
        _access(vcpu, gfn, value)


def _access(vcpu: ScriptedVcpu, gfn: int, value: int | None) -> None:
    """One access; where there is nothing, the guest goes on. Raises AssertionError for one of a free page."""
    with suppress(GuestAccessError):
        if value is not None:
            vcpu.store(gfn, value.to_bytes(8, "little"))
        elif vcpu.load(gfn) == bytes([POISON]) * 8:
            raise AssertionError(f"vcpu{vcpu.index} reads guest frame {gfn:#x}, and its page is free")
