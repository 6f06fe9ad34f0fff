"""``python -m benchmarks``: runs benchmarks, prints a table, and writes JSON if asked to.

The exit status says whether everything ran, not whether targets were reached: 0, or 1 when a benchmark failed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import tempfile
import traceback
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.status import Status
from rich.table import Table

from benchmarks import explore, flash, kernels, memory, mirrors, operations, secondaries, startup, xip
from benchmarks.harness import Bench, Benchmark, Figure, MissingPeerError, Spread
from benchmarks.peers import RAW_UNICORN, qemu_version

BENCHMARKS: dict[str, Benchmark] = {
    "kernels": kernels.kernels,
    "thrash": memory.thrash,
    "coldfault": memory.coldfault,
    "dontneed": memory.dontneed,
    "operations": operations.operations,
    "sparse": operations.sparse,
    "metadata": operations.metadata,
    "mirrors": mirrors.mirrors,
    "secondaries": secondaries.secondaries,
    "dirty": secondaries.dirty,
    "xip": xip.xip,
    "modeswitch": flash.modeswitch,
    "trace": kernels.trace,
    "check": explore.check,
    "interleavings": explore.interleavings,
    "reset": explore.reset,
    "campaign": explore.campaign,
    "exhaustive": explore.exhaustive,
    "hello": startup.hello,
    "uboot": startup.uboot,
}


def _summary(benchmark: Benchmark) -> str:
    return (benchmark.__doc__ or "").strip()


@click.command()
@click.option("--only", metavar="NAME[,NAME]", help="Run only these benchmarks.")
@click.option("--list", "list_", is_flag=True, help="Say which benchmarks there are, and end.")
@click.option("--repeat", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds of each benchmark.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(only: str | None, list_: bool, repeat: int, json_file: Path | None) -> None:
    """Measure xipvm against raw Unicorn, QEMU and the host's kernel. README.md says how to read it."""
    if list_:
        for name, benchmark in BENCHMARKS.items():
            click.echo(f"{name:<11} {_summary(benchmark)}")
        return
    names = list(BENCHMARKS) if only is None else only.split(",")
    for name in names:
        if name not in BENCHMARKS:
            raise click.BadParameter(
                f"no benchmark is called {name!r}; known are {', '.join(BENCHMARKS)}", param_hint="--only"
            )
    # Piped output has no width of its own; wrapped figures would be hard to read and to search.
    console = Console(width=None if sys.stdout.isatty() else 160)
    progress = Console(stderr=True)
    figures: dict[str, list[Figure]] = {}
    failed: dict[str, str] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="xipvm-bench-") as folder, progress.status(name) as status:
            bench = Bench(repeat, Path(folder), partial(_say, status, name))
            try:
                figures[name] = list(BENCHMARKS[name](bench))
            except MissingPeerError as missing:
                progress.print(f"{name}: skipped, {missing}", highlight=False)
            except Exception as error:
                progress.print(f"{name}: {''.join(traceback.format_exception(error))}", markup=False, highlight=False)
                failed[name] = str(error)
        if name in figures:
            console.print(_table(name, figures[name]))
    if any(figure.peer == "raw Unicorn" for found in figures.values() for figure in found):
        console.print(RAW_UNICORN, highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(_report(figures, failed, repeat), indent=1, ensure_ascii=False) + "\n")
    sys.exit(1 if failed else 0)


def _say(status: Status, name: str, text: str) -> None:
    status.update(f"{name}: {text}")


def _table(name: str, figures: list[Figure]) -> Table:
    table = Table(title=f"{name}: {_summary(BENCHMARKS[name])}", title_justify="left", title_style="bold")
    table.add_column("figure")
    table.add_column("xipvm", justify="right", no_wrap=True)
    table.add_column("peer", justify="right")
    table.add_column("ratio (min to max)", justify="right", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    table.add_column("reached", no_wrap=True)
    for figure in figures:
        target = figure.target
        wanted = "" if target is None else f"{'≥' if target.at_least else '≤'} {target.limit:.3g}"
        if target is not None and target.of_value:
            wanted += f" {figure.unit}"
        reached = {None: "", True: "yes", False: "[red]no[/red]"}[figure.reached]
        theirs = "" if figure.theirs is None else f"{_amount(figure.theirs, figure.unit)} "
        ratio = "" if figure.ratio is None else f"{_spread(figure.ratio)}"
        table.add_row(figure.what, _amount(figure.ours, figure.unit), theirs + figure.peer, ratio, wanted, reached)
    for note in dict.fromkeys(figure.note for figure in figures if figure.note):
        table.caption = f"{table.caption}\n{note}" if table.caption else note
    table.caption_justify = "left"
    return table


def _amount(spread: Spread | None, unit: str) -> str:
    return "" if spread is None else f"{spread.median:.3g} {unit}"


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def _report(figures: dict[str, list[Figure]], failed: dict[str, str], repeat: int) -> dict[str, Any]:
    return {
        "repeat": repeat,
        "host": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "unicorn": version("unicorn"),
            "qemu": qemu_version(),
        },
        "peers": RAW_UNICORN,
        "benchmarks": {
            name: [{**dataclasses.asdict(figure), "reached": figure.reached} for figure in found]
            for name, found in figures.items()
        },
        "failed": failed,
    }


if __name__ == "__main__":
    main()
