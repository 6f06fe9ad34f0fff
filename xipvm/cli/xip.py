"""``xipvm xip``: looking into images whose files can be used in place, and changing them."""

from __future__ import annotations

import errno
import stat
import sys
import time
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace
    from xipvm.xip.inode import Identity
    from xipvm.xip.mappers import Mapping
    from xipvm.xip.volume import Status, Volume


@click.group(no_args_is_help=False, short_help="Look into images of files used in place, and change them.")
def xip() -> None:
    """Look into images of files that are used in place (ext2, romfs), and change them (ext2)."""


@xip.command()
@click.argument("image")
@click.argument("path", default="/")
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
def ls(image: str, path: str, as_json: bool) -> None:
    """List a directory of IMAGE, or one file."""
    from xipvm.cli.output import print_json, print_table

    with _volume(image, path, read_only=True) as (volume, _, _):
        inode = volume.lookup(path)
        found = list(volume.names(inode)) if volume.status(inode).letter == "d" else [(path, inode)]
        rows = []
        for name, member in sorted(found, key=lambda pair: pair[0]):
            status = volume.status(member)
            rows.append((status, f"{name} -> {status.target}" if status.target else name))
    if as_json:
        print_json(
            [{"name": name, "mode": _mode(s), "links": s.links, "size": s.size, "mtime": s.mtime} for s, name in rows]
        )
        return
    print_table(
        ("mode", "links", "size", "used", "modified", "name"),
        [(_mode(s), str(s.links), str(s.size), str(s.sectors * 512), _when(s.mtime), name) for s, name in rows],
    )


@xip.command()
@click.argument("image")
@click.argument("path")
def cat(image: str, path: str) -> None:
    """Print a file of IMAGE."""
    with _volume(image, path, read_only=True) as (volume, host, trace):
        for data in volume.read_whole(host, trace, volume.lookup(path)):
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


@xip.command(short_help="Copy the file SOURCE to PATH in IMAGE.")
@click.argument("image")
@click.argument("source")
@click.argument("path")
@click.option("--force", is_flag=True, help="Replace an existing file, when the new one is whole.")
def put(image: str, source: str, path: str, force: bool) -> None:
    """Copy the file SOURCE (- for standard input) to PATH in IMAGE; runs of zeros become holes.

    PATH names the new file when that is whole: until then, and whatever becomes of the process, it names nothing, or
    with --force the old file. There has to be room for both. A file with other names has the new contents by all of
    them. What they may do with a new file is as with SOURCE, or 0644; with an old one it remains as it was.
    """
    from xipvm.cli.put import Source, put_file, target_of
    from xipvm.cli.steps import Steps

    with Source(source) as data, Steps() as steps:
        if data.waits:  # for whoever writes to it, who should not do so for nothing
            with _volume(image, path) as (volume, _, _):
                target_of(data, volume, path, force=force)
            with steps.at_once():
                data.keep()
        with _volume(image, path, again=data.waits) as (volume, host, trace):
            print(put_file(volume, host, trace, data, path, steps, force=force))


@xip.command(short_help="Make a file of IMAGE so long.")
@click.argument("image")
@click.argument("path")
@click.argument("size")
def truncate(image: str, path: str, size: str) -> None:
    """Make a file of IMAGE so long, such as 64K; what it gains is a hole."""
    from xipvm.address import parse_size
    from xipvm.cli.steps import Steps
    from xipvm.errors import BadInput

    try:
        wanted = 0 if size == "0" else parse_size(size)
    except ValueError as error:
        raise BadInput(str(error)) from None
    with Steps(), _volume(image, path) as (volume, host, trace):
        volume.file(host, trace, volume.lookup(path)).truncate(wanted)


@xip.command("map", short_help="Show the blocks of IMAGE that a file is.")
@click.argument("image")
@click.argument("path")
@click.option("--trace", metavar="FILE", help="Also who maps the pages at the end of this recorded run.")
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
def map_(image: str, path: str, trace: str | None, as_json: bool) -> None:
    """Show which pages of a file are holes, and which blocks of IMAGE, used in place, the others are."""
    from xipvm.address import PAGE_SHIFT, page_up
    from xipvm.cli.output import print_json, print_table

    with _volume(image, path, read_only=True) as (volume, host, funnel):
        inode = volume.lookup(path)
        identity = inode.identity
        volume.file(host, funnel, inode)
        pages = page_up(inode.size) >> PAGE_SHIFT
        runs: list[tuple[int, int, int | None]] = []
        at = 0
        for first, block, count in volume.extents(inode):
            if first > at:
                runs.append((at, first, None))
            runs.append((first, first + count, block))
            at = first + count
        if at < pages:
            runs.append((at, pages, None))
    mapped: dict[int, list[Mapping] | None] = {}
    otherwise: list[Mapping] | None = []
    if trace is not None:
        assert identity is not None  # it is in an image
        mapped, otherwise = _mapped(trace, path, identity, runs)
    rows = _rows(runs, mapped, otherwise, alike=not as_json)
    if as_json:
        print_json(
            [
                {"page": p, "pages": n, "block": b, "mapped": None if who is None else [*map(str, who)]}
                for p, n, b, who in rows
            ]
        )
        return
    columns = ("page", "pages", "block") if trace is None else ("page", "pages", "block", "mapped by")
    print_table(
        columns,
        [
            (
                f"{p:#x}",
                str(n),
                "hole" if b is None else f"{b:#x}",
                "?" if who is None else ", ".join(map(str, who)),
            )[: len(columns)]
            for p, n, b, who in rows
        ],
    )


def _rows(
    runs: list[tuple[int, int, int | None]],
    mapped: dict[int, list[Mapping] | None],
    otherwise: list[Mapping] | None,
    *,
    alike: bool,
) -> Iterator[tuple[int, int, int | None, list[Mapping] | None]]:
    """Pages and how many, their blocks, and who maps the first, None where that is not known.

    ``otherwise``: who maps the pages that are not in ``mapped``. Those that are mapped are a row each, unless with
    ``alike`` the same ones map them, page by page.
    """
    known = sorted(mapped)
    for first, end, start in runs:
        begin, at = first, bisect_left(known, first)
        while begin < end:
            stop, who = known[at] if at < len(known) else end, otherwise
            if stop == begin:
                stop, at, who = begin + 1, at + 1, mapped[begin]
                while stop < end and at < len(known) and known[at] == stop and (alike or not who):
                    if mapped[stop] != (who and [each.later(stop - begin) for each in who]):
                        break
                    stop, at = stop + 1, at + 1
            stop = min(stop, end)
            yield begin, stop - begin, None if start is None else start + begin - first, who
            begin = stop


def _mapped(
    trace: str, path: str, wanted: Identity, runs: list[tuple[int, int, int | None]]
) -> tuple[dict[int, list[Mapping] | None], list[Mapping] | None]:
    """By page of a file: who maps it at the end of a run, None where it is not what it was; and who maps the others.

    Says so where anything is not known.
    """
    from xipvm.trace.reader import TraceReader
    from xipvm.xip.mappers import HOLE, Mappers

    mappers = Mappers()
    with TraceReader(trace) as reader:
        mappers.feed(reader)
    files = mappers.same(wanted)
    if not files:
        others = [f"{name!a} ({one.at})" for name, one in mappers.files.values() if one.at != wanted.at]
        what = f"; it does map {', '.join(others[:4])}{' and others' if others[4:] else ''}" if others else ""
        if any(one.at == wanted.at for _, one in mappers.files.values()):
            what = ", but another file that was that inode"
        if mappers.nameless:
            what = ", as far as can be seen: it does not say which files it maps"
        print(f"xipvm: {trace}: does not map {path} ({wanted.at}){what}", file=sys.stderr)
        return {}, None
    firsts = [first for first, _, _ in runs]
    found: dict[int, list[Mapping] | None] = {}
    changed: dict[int, int] = {}
    for file in files:
        for page, everybody in mappers.of(file).items():
            first, end, start = runs[bisect_right(firsts, page) - 1] if runs else (0, 0, None)
            block = HOLE if start is None else start + page - first
            right = [each for each in everybody if page < end and each.block == block]
            changed.update((page, each.block) for each in everybody if each not in right)
            found[page] = (found.get(page) or []) + right or None
    if changed:
        page, old = min(changed.items())
        what = f"page {page:#x} of {path} is {'a hole' if old == HOLE else f'block {old:#x}'} there, and not here"
        more = f"; so are {len(changed) - 1} others" if len(changed) > 1 else ""
        print(f"xipvm: {trace}: {what}{more}", file=sys.stderr)
    return found, []


@xip.command()
@click.argument("image")
@click.argument("path")
def mkdir(image: str, path: str) -> None:
    """Make a directory in IMAGE."""
    from xipvm.cli.steps import Steps

    with Steps(), _volume(image, path) as (volume, _, _):
        volume.mkdir(path)


@xip.command()
@click.argument("image")
@click.argument("path")
def rm(image: str, path: str) -> None:
    """Remove a file, or an empty directory, of IMAGE."""
    from xipvm.cli.steps import Steps

    with Steps(), _volume(image, path) as (volume, _, _):
        volume.unlink(path)


@contextmanager
def _volume(
    image: str, path: str, *, read_only: bool = False, again: bool = False
) -> Iterator[tuple[Volume, HostMemory, Trace]]:
    """The file system in ``image``, for what is to be done with ``path``, which complaints name. Raises BadInput.

    ``again``: it was looked at before, and the user knows what state it is in.
    """
    from xipvm.errors import BadInput, MmError, XipImageError
    from xipvm.image_file import READ_IT, SHARE_IT
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace
    from xipvm.xip.volume import naming, open_volume

    if not path:
        raise BadInput(f"{image}: the PATH in it is empty")
    host = HostMemory(1 << 20)
    try:
        with open_volume(host, image, read_only=read_only) as volume:
            if not (volume.clean or again):
                print(f"xipvm: {image}: was not put away properly; e2fsck -f repairs it", file=sys.stderr)
            if volume.read_only and not read_only:
                raise MmError(errno.EROFS, f"{path}: {volume.kind} is never written")
            with naming(path):
                yield volume, host, Trace()
    except XipImageError as error:
        helps = {READ_IT: "'ls', 'cat' and 'map' only read it", SHARE_IT: "it can be changed when that has ended"}
        if error.hint:  # for a run
            raise BadInput(f"{image}: {error.reason}; {helps[error.hint]}") from None
        raise
    except MmError as error:
        raise BadInput(f"{image}: {str(error).removeprefix(f'{image}: ')}") from None
    finally:
        host.close()


def _mode(status: Status) -> str:
    return status.letter + stat.filemode(status.rights)[1:]


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
