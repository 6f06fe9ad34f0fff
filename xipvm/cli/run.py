"""``xipvm run``: a machine from the options, its run, and what is said about it afterwards."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from xipvm.address import format_size
from xipvm.console import Console
from xipvm.devices.flash.files import parse_option
from xipvm.errors import BadInput, TraceFileError, os_reason
from xipvm.image_option import ImageChoice, open_elf, parse_image
from xipvm.machine import Machine
from xipvm.result import RunResult
from xipvm.trace.funnel import Trace
from xipvm.trace.history import History

if TYPE_CHECKING:
    from xipvm.check import Oracle, Violation
    from xipvm.export import Export, ExportOption
    from xipvm.trace.recorder import Recorder


def run_guest(
    *,
    guest: str | None,
    board: str | None,
    memory: int | None,
    smp: int,
    flash: tuple[str, ...],
    secondary: str,
    devices: tuple[str, ...],
    clock: str,
    trace: str | None,
    check: bool,
    timeout: float | None,
    max_instructions: int | None,
    input_file: str | None,
    until: str | None,
    dtb: str | None,
    ram_alias: int | None,
    pin_sptes: bool,
    hugetlb: bool,
    thp: str,
    dirty_log: bool,
    dirty_ring: int | None,
    protocol: str,
    host_memory: int | None,
    swap: str | None,
    storm: str | None,
    export: tuple[str, ...],
    image: str | None,
    map_files: tuple[str, ...],
    quiet: bool,
) -> int:
    """Run a guest as the options of ``xipvm run`` say. Returns the exit status. Raises XipvmError."""
    check_start(guest, board, flash, until)
    if max_instructions is not None and clock == "host":
        raise BadInput("an instruction limit needs the instructions clock")
    options = [parse_option(text) for text in flash]
    choice = None if image is None else parse_image(image)
    exports = _parse_exports(export)
    logging: dict[str, Any] = {"dirty_log": 0} if dirty_log else {}
    if dirty_ring is not None:
        logging["dirty_log"] = dirty_ring
    if storm is not None:
        from xipvm.storm import parse_storm
    funnel = Trace()
    machine: Machine | None = None
    oracle: Oracle | None = None
    if check:
        from xipvm.check import Oracle, reader_of

        def broken(violation: Violation) -> None:
            if machine is not None:
                machine.request_exit("check", 1)

        oracle = Oracle(stop=broken)
        history = oracle.history
        funnel.attach(oracle)
    else:
        history = History()
        funnel.attach(history)

    def trace_failed(error: TraceFileError) -> None:
        if machine is None:
            raise error
        machine.request_exit("trace", 2)

    with _console(input_file, until) as console:
        recorder: Recorder | None = None
        if trace is not None:
            from xipvm.trace.recorder import Recorder

            info = _machine_info(guest, choice, board, memory, smp, secondary=secondary, clock=clock)
            info |= {"protocol": protocol, "pin_sptes": pin_sptes, "hugetlb": hugetlb, "thp": thp}
            if devices:
                info["devices"] = sorted(devices)
            if storm is not None:
                info["storm"] = storm
            recorder = Recorder(trace, machine=info, deferred=True, on_error=trace_failed)
            funnel.attach(recorder)
        try:
            with Machine(
                board=board,
                guest=guest,
                memory=memory,
                smp=smp,
                flash=options,
                clock=clock,
                secondary=secondary,
                devices=devices,
                trace=funnel,
                console=console,
                dtb=dtb,
                ram_alias=ram_alias,
                pin_sptes=pin_sptes,
                hugetlb=hugetlb,
                thp=thp,
                **logging,
                protocol=protocol,
                host_memory=host_memory,
                swap=swap,
                image=choice,
                map_files=map_files,
                storm=None if storm is None else parse_storm(storm),
            ) as machine:
                machine.history = history
                if oracle is not None:
                    oracle.reader = reader_of(machine.host)
                served = _export(machine, exports, quiet)
                result = machine.run(timeout=timeout, max_instructions=max_instructions, until=until)
                notes = () if machine.placement is None else machine.placement.notes
                for each in served:
                    each.close()
                # Closing takes everything away at once, in no order.
                if recorder is not None:
                    funnel.detach(recorder)
                if oracle is not None:
                    funnel.detach(oracle)
        finally:
            if recorder is not None:
                if machine is None:
                    recorder.discard()
                else:
                    recorder.close()
    if sys.stdout.isatty() and console.tail and not console.tail.endswith(b"\n"):
        _say("")  # the guest's last line ends here
    if result.report is not None:
        _say(result.report.render())
        for note in notes:
            _say(f"note: {note}")
    if oracle is not None:
        for violation in oracle.violations:
            _say(violation.render())
    if not quiet:
        _summarise(result)
        if oracle is not None:
            _say(f"xipvm: {oracle.events} events checked, {len(oracle.violations)} violations")
        if until is not None and result.reason != "until":
            _say(f"xipvm: {until!r} did not come after the input")
    if recorder is not None and recorder.error is not None:
        raise recorder.error
    if oracle is not None and oracle.violations:
        return 1
    return result.status if 0 <= result.status <= 255 else (result.status & 0xFF or 1)


def _parse_exports(texts: tuple[str, ...]) -> list[ExportOption]:
    """What ``--export`` says. Raises BadInput."""
    if not texts:
        return []
    from xipvm.export import parse_export

    options = [parse_export(text) for text in texts]
    for what in ("name", "path"):
        seen = [getattr(option, what) for option in options]
        for value in seen:
            if seen.count(value) > 1:
                raise BadInput(f"two exports have the {what} {value}")
    return options


def _export(machine: Machine, options: list[ExportOption], quiet: bool) -> list[Export]:
    """Serve the segments; they end with the machine. Raises BadInput."""
    if not options:
        return []
    from xipvm.export import Export

    served = []
    for number, option in enumerate(options):
        made = Export(machine, option, name=f"xpmem{number}", log=lambda line: _say(f"xipvm: {line}"))
        served.append(made)
        if not quiet:
            _say(f"xipvm: {made}")
    return served


def check_start(guest: str | None, board: str | None, flash: tuple[str, ...], until: str | None) -> None:
    """There is something to run, and it can end. Raises BadInput."""
    if guest is None and not flash:
        raise BadInput("there is nothing to run: name a GUEST, or a flash image with --flash")
    if guest is None and board is None:
        raise BadInput("without a GUEST the board has to be named: --board, see 'xipvm boards'")
    if until == "":
        raise BadInput("--until needs a text to wait for")


_INPUT_LIMIT = 64 << 20


def read_input(path: str) -> bytes:
    """The console input that a file has. Raises BadInput."""
    try:
        with open(path, "rb") as file:
            script = file.read(_INPUT_LIMIT + 1)
    except OSError as error:
        raise BadInput(f"{path}: {os_reason(error)}") from error
    if len(script) > _INPUT_LIMIT:
        raise BadInput(f"{path}: more than {format_size(_INPUT_LIMIT)} of console input; pipe it in instead")
    return script


def _console(input_file: str | None, until: str | None) -> Console:
    """The guest's console: a script, or standard input as it comes. Raises BadInput."""
    if input_file is not None:
        return Console(sys.stdout.buffer, read_input(input_file))
    # A terminal never runs out of input, so waiting for a text behind the last of it means that there is none.
    if sys.stdin is None or sys.stdin.closed or (until is not None and sys.stdin.isatty()):
        return Console(sys.stdout.buffer, b"")
    return Console.stdio()


def _machine_info(
    guest: str | None,
    image: ImageChoice | None,
    board: str | None,
    memory: int | None,
    smp: int,
    *,
    secondary: str,
    clock: str,
) -> dict[str, Any]:
    """What the header of a trace says of its machine; the same for equal runs, wherever their files lie."""
    import os

    from xipvm import boards
    from xipvm.loader import board_for

    if board is not None:
        chosen = boards.get(board)
    else:
        chosen = board_for(open_elf(guest or "", image))
    return {
        "board": chosen.name,
        "memory": chosen.default_memory if memory is None else memory,
        "smp": smp,
        "secondary": secondary,
        "clock": clock,
        "guest": None if guest is None else os.path.basename(guest),
    }


_ENDINGS = {
    "exit": "the guest ended",
    "until": "the awaited text came",
    "timeout": "the time limit was reached",
    "limit": "the instruction limit was reached",
    "crash": "the guest crashed",
    "oom": "the host was out of memory and killed the machine's process",
    "quit": "ended from the console",
    "interrupted": "interrupted",
    "check": "the oracle stopped it",
    "trace": "the trace could not be written",
}


def _summarise(result: RunResult) -> None:
    summary = result.summary
    _say(f"xipvm: {_ENDINGS.get(result.reason, result.reason)}, status {result.status}")
    amount = "" if summary.instructions is None else f"{_counted(summary.instructions, 'instruction')} in "
    speed = "" if summary.mips is None else f" ({summary.mips:.1f} MIPS)"
    _say(f"xipvm: {amount}{summary.seconds:.3f} s{speed}")
    counts = [
        (summary.guest_faults, "guest fault"),
        (summary.invalidations, "invalidation"),
        (summary.tlb_flushes, "TLB flush"),
        (summary.flash_programs, "flash program"),
        (summary.flash_erases, "flash erase"),
    ]
    _say("xipvm: " + ", ".join(_counted(count, what) for count, what in counts))
    if summary.dirty_pages is not None:
        _say(f"xipvm: dirty log: {_counted(summary.dirty_pages, 'page')} of RAM written")
    if summary.image_pages is not None:
        in_place, copied = summary.image_pages
        why = "" if not copied else " (their place in the file is not their place in memory, modulo 4K)"
        _say(f"xipvm: of the image, {_counted(in_place, 'page')} in place, {_counted(copied, 'page')} copied{why}")
    if summary.reclaimed or summary.swap_ins:
        pressure = f"{_counted(summary.reclaimed, 'page')} reclaimed"
        swapped = f"{_counted(summary.swap_outs, 'swap-out')}, {_counted(summary.swap_ins, 'swap-in')}"
        errors = f", {_counted(summary.swap_errors, 'swap error')}" if summary.swap_errors else ""
        _say(f"xipvm: {pressure}, {swapped}{errors}")


def _counted(count: int, what: str) -> str:
    if count == 1:
        return f"1 {what}"
    return f"{count} {what}{'es' if what.endswith('sh') else 's'}"


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
