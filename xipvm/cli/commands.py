"""The commands and their options. What a command does is in a module of its own, imported when it is used."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import click

from xipvm.address import parse_size
from xipvm.cli.xip import xip
from xipvm.errors import BadInput


class Converted(click.ParamType):  # type: ignore[type-arg] # generic only since click 8.2
    """An option whose text ``convert`` understands; its ValueError is the complaint."""

    def __init__(self, name: str, convert: Callable[[str], Any]) -> None:
        self.name = name
        self._convert = convert

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What ``value`` means. Fails with one line."""
        if not isinstance(value, str):
            return value
        try:
            return self._convert(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"{text!r} is no positive number of seconds")
    return seconds


def _hexadecimal(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise ValueError(f"{text!r} is not a hexadecimal number") from None


def _only(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str | None:
    """What is given at most once, where the last one would count, and nobody hears of the others."""
    if len(values) > 1:
        raise click.BadParameter(f"there can be one only, and {len(values)} are given", ctx, param)
    return values[0] if values else None


SIZE = Converted("size", parse_size)
SECONDS = Converted("seconds", _seconds)
HEX = Converted("hex", _hexadecimal)

# What several commands have.
_memory = click.option("--memory", type=SIZE, help="RAM, such as 64M or 1G; by default the board's.")
_smp = click.option("--smp", type=int, default=1, metavar="N", help="Number of vCPUs; 1.")
_input = click.option("--input", "input_file", metavar="FILE", help="Console input, fed as the guest reads it.")
_secondary = click.option(
    "--secondary",
    metavar="NAME",
    default="kvm",
    help="The secondary MMU behind which the guest runs: kvm, the default, kvm-shadow, which walks the guest's page"
    " tables for it, or gru, which has TLBs only.",
)
_device = click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="A device beside the board's own: a DMA engine that pins nothing, by on-demand paging (odp) or SVA (sva).",
)
_protocol = click.option(
    "--protocol",
    type=click.Choice(["modern", "2008"]),
    default="modern",
    help="How the secondary MMU is told of changes: as Linux does today, the default, or as MMU notifiers began.",
)
_host_memory = click.option(
    "--host-memory", type=SIZE, help="The host's memory, such as 8M; by default it has room for all of the guest's RAM."
)
_swap = click.option(
    "--swap",
    metavar="SIZE|FILE[,size=SIZE]",
    help="Where pages go that the host's memory has no room for: a temporary file, or a swap file.",
)
_thp = click.option(
    "--thp",
    type=click.Choice(["always", "madvise", "never"]),
    default="madvise",
    help="Transparent huge pages: with 'always' RAM is backed by pages of 2 MiB as far as there are any.",
)
_image = click.option(
    "--image",
    multiple=True,
    callback=_only,
    metavar="FILE[,snapshot=on][,readonly=on]",
    help="A file system (ext2, romfs): GUEST is the path of a file in it, executed in place; see 'xipvm xip'.",
)
_map_files = click.option(
    "--map",
    "map_files",
    multiple=True,
    metavar="PATH@ADDRESS[,shared=on]",
    help="With --image: another of its files is guest memory at ADDRESS, such as 0x60000000. May be repeated.",
)


class OutputClosedError(Exception):
    """Whoever read our standard output has gone."""


class Commands(click.Group):
    """A group that tells of a broken pipe; click itself would end the process with status 1, as if a guest crashed."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises OutputClosedError."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise OutputClosedError from error


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"xipvm {version('xipvm')}")
    except PackageNotFoundError:
        click.echo("xipvm, not installed as a package")
    ctx.exit()


@click.group(
    cls=Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def cli() -> None:
    """Run guests in place from emulated flash, behind a secondary MMU that MMU notifiers keep coherent."""


@cli.command()
@click.argument("guest", required=False)
@click.option("--board", metavar="NAME", help="The board; by default the one that GUEST is for. See 'xipvm boards'.")
@_memory
@_smp
@click.option(
    "--flash",
    multiple=True,
    metavar="FILE[,bank=N][,snapshot=on][,readonly=on]",
    help="A flash image; stores go to the file, with snapshot=on nowhere. May be repeated.",
)
@_secondary
@_device
@click.option(
    "--clock",
    type=click.Choice(["instructions", "host"]),
    default="instructions",
    help="What guest time is: retired instructions (repeatable), the default, or the host's time (faster).",
)
@click.option("--trace", metavar="FILE", help="Record everything that happens; see 'xipvm trace show'.")
@click.option(
    "--check", is_flag=True, help="Judge every event as 'xipvm check' does; end with status 1 at the first error."
)
@click.option("--timeout", type=SECONDS, help="End the run after so many seconds, with status 124.")
@click.option(
    "--max-instructions",
    type=click.IntRange(min=1),
    metavar="N",
    help="Likewise, at the block that reaches N instructions.",
)
@_input
@click.option("--until", metavar="TEXT", help="End with status 0 when the input is used up and the guest prints TEXT.")
@click.option("--dtb", metavar="FILE", help="Device tree for the guest, instead of the board's own.")
@_protocol
@click.option(
    "--pin-sptes",
    is_flag=True,
    help="The secondary MMU hears of nothing and pins every page it maps, as KVM did before there were notifiers.",
)
@_host_memory
@_swap
@click.option("--hugetlb", is_flag=True, help="RAM is huge pages of 2 MiB, taken from the host's pool before the run.")
@_thp
@click.option("--dirty-log", is_flag=True, help="Keep KVM's dirty log of RAM; say how many pages were written.")
@click.option(
    "--dirty-ring", type=click.IntRange(min=1), metavar="N", help="The same by a ring of N entries for each vCPU."
)
@click.option(
    "--ram-alias",
    type=HEX,
    metavar="ADDRESS",
    help="RAM appears a second time at ADDRESS, hexadecimal, such as 2000000000.",
)
@click.option(
    "--storm",
    metavar="SEED[,rate=N][,ops=NAME+NAME...]",
    help="Do random things to the host's memory that must not change what the guest computes; see 'xipvm storm', and"
    " 'xipvm storm --ops help' for the names.",
)
@click.option(
    "--export",
    multiple=True,
    metavar="NAME=BASE,SIZE[,path=SOCKET][,readonly=on][,timeout=S]",
    help="Let other processes use SIZE bytes of RAM from BASE on while the guest runs; see 'xipvm attach'.",
)
@_image
@_map_files
@click.option("--quiet", is_flag=True, help="No summary on stderr.")
def run(**options: Any) -> int:
    """Run GUEST, an ELF file, in place. Without GUEST the machine starts from the flash images.

    The exit status is the guest's own; 124 on a limit, 1 when the guest crashed, 137 when the host's OOM killer
    ended it, 2 for bad input.
    """
    from xipvm.cli.run import run_guest

    return run_guest(**options)


@cli.command()
@click.argument("socket")
@click.argument("words", metavar="[VERB ...]", nargs=-1)
@click.option("--segment", metavar="NAME", help="The segment; by default the only one that there is.")
@click.option("--readonly", is_flag=True, help="Attach it for reading only.")
@click.option("--timeout", type=SECONDS, default=10.0, help="Give up when an answer takes so many seconds; 10.")
@click.option("--interval", type=SECONDS, default=0.2, help="How often 'watch' looks, in seconds; 0.2.")
def attach(
    socket: str, words: tuple[str, ...], segment: str | None, readonly: bool, timeout: float, interval: float
) -> int:
    """Use memory that 'xipvm run --export' serves on SOCKET. Without VERB, verbs are read from standard input.

    \b
    info                   what there is, and how often pages were faulted and recalled
    read OFFSET SIZE       bytes, as they are, on standard output
    dump OFFSET SIZE       the same, to be read by people
    write OFFSET TEXT      store TEXT; 0x... are bytes in hexadecimal, @FILE those of a file
    watch OFFSET SIZE      show them whenever they change, until Ctrl-C

    OFFSET is from the beginning of the segment. What one page was is forgotten as soon as the owner takes it back, and
    faulted in again when it is needed. The exit status is 1 when a verb failed or the owner has gone, 2 for bad input.
    """
    from xipvm.cli.attach import attach_segment

    return attach_segment(socket, words, segment=segment, readonly=readonly, timeout=timeout, interval=interval)


@cli.command(short_help="Run GUEST calmly and under storms of mm operations; compare.")
@click.argument("guest", required=False)
@click.option("--board", metavar="NAME", help="The board; by default the one that GUEST is for.")
@_memory
@_smp
@click.option(
    "--flash",
    multiple=True,
    metavar="FILE[,bank=N][,readonly=on]",
    help="A flash image; every run begins with what is in it, and none writes to it. May be repeated.",
)
@_input
@click.option("--until", metavar="TEXT", help="End when the input is used up and the guest prints TEXT.")
@click.option("--max-instructions", type=click.IntRange(min=1), metavar="N", help="End at the block that reaches N.")
@_secondary
@_device
@_protocol
@_host_memory
@_swap
@_thp
@_image
@_map_files
@click.option("--seeds", type=click.IntRange(min=1), default=20, metavar="N", help="How many storms; 20.")
@click.option("--first", type=click.IntRange(min=0), default=1, metavar="SEED", help="The seed of the first; 1.")
@click.option("--rate", type=int, default=10, metavar="N", help="Operations in a million instructions, about; 10.")
@click.option(
    "--ops", metavar="NAME+NAME...", help="Only these operations, or groups of them; all. '--ops help' lists both."
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, metavar="N", help="Runs at a time; 1.")
def storm(**options: Any) -> int:
    """Run GUEST once calmly, then under storms, and compare console, exit, instructions, RAM, flash and image files.

    A storm does random things to the host's memory that must not change what the guest computes: pages are swapped,
    moved, merged, split, protected, forked. Nothing is written to images. The exit status is 0 when no run differs from
    the calm one, else 1.
    """
    from xipvm.cli.storm import storm_guest

    return storm_guest(**options)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def boards(as_json: bool) -> None:
    """List the boards and their memory maps."""
    from xipvm.cli.boards import list_boards

    list_boards(as_json=as_json)


@cli.command()
@click.argument("guest")
@click.option("--board", metavar="NAME", help="The board; by default the one that GUEST is for.")
@_memory
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(guest: str, board: str | None, memory: int | None, as_json: bool) -> None:
    """Show what of GUEST would be placed where, and run nothing."""
    from xipvm.cli.inspect import inspect_guest

    inspect_guest(guest, board, memory, as_json=as_json)


@cli.command(short_help="Replay scenarios that were recorded on Linux with KVM.")
@click.argument("paths", metavar="FILE|DIR...", nargs=-1, required=True)
@click.option("--detail", is_flag=True, help="Also show what differs of KVM's own doings; it does not count.")
@click.option("--skip-unsupported", is_flag=True, help="Scenarios with operations that are not modelled do not count.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def conform(paths: tuple[str, ...], detail: bool, skip_unsupported: bool, as_json: bool) -> int:
    """Replay scenarios that were recorded on Linux with KVM, and compare. DIR stands for the .json files in it.

    The exit status is 0 when all pass, 1 when one differs or needs an operation that is not modelled, 2 when a file is
    no scenario. A scenario whose outcome depends on timing, as it says itself, may vary.
    """
    from xipvm.cli.conform import conform as replay_all

    return replay_all(list(paths), detail=detail, skip_unsupported=skip_unsupported, as_json=as_json)


@cli.command(short_help="Judge recorded runs by the invariants of MMU notifiers.")
@click.argument("paths", metavar="TRACE...", nargs=-1, required=True)
@click.option("--invariant", "invariants", multiple=True, metavar="NAME", help="Only this one, such as I5.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON a trace.")
def check(paths: tuple[str, ...], invariants: tuple[str, ...], as_json: bool) -> int:
    """Judge recorded runs: was every translation invalidated before its page was reused?

    The exit status is 0 when no invariant is broken, 1 when one is, 2 when a file is no trace. 'xipvm run --check'
    judges a run while it goes on.
    """
    from xipvm.cli.check import check_traces

    return check_traces(paths, invariants, as_json=as_json)


@cli.command(short_help="Search the interleavings of SCENARIO for a wrong one.")
@click.argument("scenario", required=False)
@click.option(
    "--strategy",
    type=click.Choice(["random", "pct", "coverage", "exhaustive"]),
    default="random",
    help="How the interleavings are searched.",
)
@click.option(
    "--runs", type=click.IntRange(min=1), metavar="N", help="At most so many; 1000, and all there are if 'exhaustive'."
)
@click.option("--seed", type=int, default=0, metavar="N", help="Of all chance; 0.")
@click.option("--preemptions", metavar="N", help="Bound of 'exhaustive', or 'all'; 2.")
@click.option(
    "--reduction/--no-reduction",
    default=True,
    help="Of runs that are the same but for the order of independent steps 'exhaustive' makes one; or all.",
)
@_protocol
@click.option(
    "--mutant",
    "mutants",
    multiple=True,
    metavar="NAME",
    help="With this known fault, or its number; see 'xipvm mutants'.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, metavar="N", help="So many processes; 1.")
@click.option(
    "--executor",
    type=click.Choice(["local", "dask"]),
    default="local",
    help="Where: processes here, or a Dask cluster.",
)
@click.option("--scheduler", metavar="ADDRESS", help="The Dask scheduler, as tcp://host:8786.")
@click.option("--save", metavar="FILE", help="Where a counterexample goes; by default SCENARIO.xipvm.json.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def explore(
    scenario: str | None,
    strategy: str,
    runs: int | None,
    seed: int,
    preemptions: str | None,
    reduction: bool,
    protocol: str,
    mutants: tuple[str, ...],
    jobs: int,
    executor: str,
    scheduler: str | None,
    save: str | None,
    quiet: bool,
) -> int:
    """Search the interleavings of SCENARIO for one that breaks the protocol; without SCENARIO, list those there are.

    SCENARIO is a name, or FILE.py:NAME for one of your own. What is wrong is shrunk, shown and saved for 'xipvm
    replay'. The exit status is 0 when nothing is wrong, 1 when something is, 2 for bad input.
    """
    from xipvm.cli.explore import explore_scenario, list_scenarios

    if scenario is None:
        list_scenarios()
        return 0
    from xipvm.explore.shards import Shard

    if strategy != "exhaustive" and (preemptions is not None or not reduction):
        raise BadInput("--preemptions and --no-reduction are for --strategy exhaustive")
    preemptions = "2" if preemptions is None else preemptions
    if preemptions != "all" and not preemptions.isdecimal():
        raise BadInput(f"--preemptions {preemptions}: a number, or 'all'")
    bound = None if preemptions == "all" else int(preemptions)
    runs = runs or (sys.maxsize if strategy == "exhaustive" else 1000)
    whole = Shard(scenario, strategy, str(seed), runs, bound, protocol, mutants, reduce=reduction)
    return explore_scenario(whole, jobs=jobs, executor=executor, scheduler=scheduler, save=save, quiet=quiet)


@cli.command()
@click.argument("file")
@click.option("--continue", "go_on", is_flag=True, help="When the program has changed, go on from the common part.")
@click.option("--events", is_flag=True, help="Show every event of the run first.")
def replay(file: str, go_on: bool, events: bool) -> int:
    """Run a counterexample FILE again.

    The exit status is 1 when it is still wrong, 0 when it is right now, 2 when FILE is none or the program does
    something else than it did.
    """
    from xipvm.cli.explore import replay_file

    return replay_file(file, go_on=go_on, events=events)


@cli.command(short_help="List known faults that can be planted, or hunt them.")
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--run", "how", flag_value="run", help="Hunt them: all, or those named.")
@click.option("--control", "how", flag_value="control", help="Hunt nothing: the right system must have no report.")
@click.option("--ablate", "how", flag_value="ablate", help="Hunt with each invariant switched off: which escape then.")
@click.option("--runs", type=click.IntRange(min=1), default=200, metavar="N", help="At most so many a scenario; 200.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of all chance; 0.")
@click.option("--json", "form", flag_value="json", help="One line of JSON a mutant.")
@click.option("--markdown", "form", flag_value="markdown", help="With --run or --ablate: a table for a document.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def mutants(names: tuple[str, ...], how: str | None, runs: int, seed: int, form: str | None, quiet: bool) -> int:
    """Known faults that can be planted: list them, or see that they are found.

    Scenarios do not know of mutants. 'xipvm explore --mutant NAME' searches one scenario with a fault planted. The exit
    status is 1 when a mutant is not caught by two strategies, when the right system has a report (--control), or when
    an invariant is missed by no mutant (--ablate).
    """
    from xipvm.cli.mutants import ablate, control, list_mutants, run_mutants

    form = form or "text"
    if how == "run":
        return run_mutants(names, runs=runs, seed=seed, form=form, quiet=quiet)
    if how == "ablate":
        return ablate(names, runs=runs, seed=seed, form=form, quiet=quiet)
    if how == "control":
        if names:
            raise BadInput("--control hunts nothing: it takes no NAME")
        return control(runs=runs, seed=seed, as_json=form == "json", quiet=quiet)
    return list_mutants(names, as_json=form == "json")


cli.add_command(xip)


@cli.group(no_args_is_help=False)
def flash() -> None:
    """Make flash images."""


@flash.command()
@click.argument("file")
@click.option("--board", required=True, metavar="NAME")
@click.option("--bank", type=click.IntRange(min=0), metavar="N", help="Only this bank, not all of them.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def create(file: str, board: str, bank: int | None, force: bool) -> None:
    """Write an erased image of all flash banks of a board, or of one."""
    from xipvm.cli.flash import create_image

    create_image(file, board, bank, force=force)


@flash.command(short_help="Append erased bytes to FILE up to the size of its flash.")
@click.argument("file")
@click.option("--board", required=True, metavar="NAME")
@click.option("--bank", type=click.IntRange(min=0), metavar="N", help="The bank that it is for.")
def pad(file: str, board: str, bank: int | None) -> None:
    """Append erased bytes to FILE up to the size of the flash bank, or of all banks."""
    from xipvm.cli.flash import pad_image

    pad_image(file, board, bank)


@cli.group(no_args_is_help=False)
def trace() -> None:
    """Look into traces."""


@trace.command()
@click.argument("file")
@click.option("--kind", multiple=True, metavar="KIND", help="Only this kind; may be a pattern, may be repeated.")
@click.option("--actor", multiple=True, metavar="ACTOR", help="Only this actor; may be a pattern, may be repeated.")
@click.option("--page", type=HEX, metavar="HEX", help="Only events that name this page number or address.")
@click.option("--from", "first", type=int, metavar="SEQ", help="Only from this sequence number on.")
@click.option("--to", "last", type=int, metavar="SEQ", help="Only up to this sequence number.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON an event.")
def show(
    file: str,
    kind: tuple[str, ...],
    actor: tuple[str, ...],
    page: int | None,
    first: int | None,
    last: int | None,
    as_json: bool,
) -> None:
    """Print the events of a trace FILE.

    A line each: virtual time in nanoseconds, #SEQ, who did it, what, its fields, and '<- #SEQ', the event that it was
    done for.
    """
    from xipvm.cli.trace import show_trace
    from xipvm.trace.show import Filter

    show_trace(file, Filter(kind, actor, page, first, last), as_json=as_json)
