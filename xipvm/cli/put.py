"""``xipvm xip put``: a file of the host goes into an image, whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import IO, TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from xipvm.cli.steps import Steps
    from xipvm.mmu.frames import HostMemory
    from xipvm.trace.funnel import Trace
    from xipvm.xip.filemap import XipFile
    from xipvm.xip.volume import Volume

_LARGE: Final = 16 << 20
"""From how many bytes on one likes to see how far it has come."""


class Source:
    """A file of the host, or with ``-`` standard input, read from the beginning as often as one likes. A context."""

    def __init__(self, path: str) -> None:
        """Opens it. Raises BadInput."""
        from xipvm.errors import BadInput, os_reason

        self.path = path
        self.name = "standard input" if path == "-" else path
        try:
            if path == "-":
                if sys.stdin is None:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self._file: IO[bytes] = sys.stdin.buffer
            else:
                self._file = open(path, "rb")  # noqa: SIM115
            self.waits = path == "-" or not self._file.seekable()
            """It cannot be read twice: :meth:`keep` it."""
            mode = os.fstat(self._file.fileno()).st_mode if path != "-" else 0
            self.rights = mode & 0o777 if stat.S_ISREG(mode) else 0o644
            """What its owner, group and others may do with it, or usually may."""
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.name}: {os_reason(error)}") from None

    def keep(self) -> None:
        """Reads all of it, which may take as long as it takes somebody to write it. Raises BadInput."""
        import shutil
        import tempfile

        from xipvm.errors import BadInput, os_reason

        try:
            spool = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                shutil.copyfileobj(self._file, spool)
                spool.flush()
            except BaseException:
                with suppress(OSError):  # it tries once more to write what did not fit
                    spool.close()
                raise
        except (OSError, ValueError) as error:
            name = self.name
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                name = f"{name} is kept in {tempfile.gettempdir()} (TMPDIR) until it is whole, and does not fit"
            raise BadInput(f"{name}: {os_reason(error)}") from None
        self._file.close()
        self._file = spool

    @property
    def size(self) -> int:
        """Bytes, 0 where nobody knows."""
        return os.fstat(self._file.fileno()).st_size

    def runs(self) -> Iterator[tuple[bytes, bool]]:
        """Its pages, those that have data, and those that have only zeros, as far as they follow one another.

        And as far as they are of one huge page. The last one is as long as it is. Raises BadInput.
        """
        from xipvm.address import PAGE_SIZE
        from xipvm.errors import BadInput, os_reason
        from xipvm.mmu.frames import HUGE_PAGES

        zeros = bytes(PAGE_SIZE)
        try:
            self._file.seek(0)
            while data := self._file.read(HUGE_PAGES * PAGE_SIZE):
                pages = (data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE))
                for stored, run in groupby(pages, lambda page: page != zeros[: len(page)]):
                    yield b"".join(run), stored
        except OSError as error:
            raise BadInput(f"{self.name}: {os_reason(error)}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def put_file(
    volume: Volume, host: HostMemory, trace: Trace, data: Source, path: str, steps: Steps, *, force: bool
) -> str:
    """Makes ``data`` the file ``path``, or one in it, a directory; what there is to say of it.

    Raises BadInput, MmError, and what ``steps`` does; the image is as it was then.
    """
    from xipvm.xip.volume import naming

    path, replaces = target_of(data, volume, path, force=force)
    with naming(path):
        volume.check_room(data.size, _wanted(steps.of(data.runs())), path, replaces=replaces)
        inode = volume.tmpfile(path, data.rights)
        try:
            _copy(steps.of(data.runs()), volume.file(host, trace, inode), data.size)
            if replaces:
                volume.replace(inode, path)
            else:
                volume.link(inode, path)
        except BaseException:
            volume.discard(inode)
            raise
    status = volume.status(volume.lookup(path))
    return f"{path}: {status.size} bytes, {status.sectors * 512} used"


def target_of(data: Source, volume: Volume, path: str, *, force: bool) -> tuple[str, bool]:
    """Where ``data`` is to be in the image, and whether a file is there. Raises BadInput, MmError."""
    from xipvm.errors import BadInput, MmError

    try:
        letter = volume.status(volume.lookup(path)).letter
        if letter == "d":
            if data.path == "-":
                raise BadInput(f"{volume.path}: {path} is a directory, and standard input has no name to have in it")
            path = f"{path.rstrip('/')}/{os.path.basename(data.path)}"
            letter = volume.status(volume.lookup(path)).letter
    except MmError as error:
        if error.errno != errno.ENOENT:
            raise
        above = path.rstrip("/").rpartition("/")[0]
        if volume.status(volume.lookup(above)).letter != "d":
            raise MmError(errno.ENOTDIR, above) from None
        return path, False
    if letter != "-":
        raise MmError(errno.EISDIR if letter == "d" else errno.EINVAL, path)
    if not force:
        raise BadInput(f"{volume.path}: {path} exists; --force replaces it")
    return path, True


def _wanted(runs: Iterator[tuple[bytes, bool]]) -> Iterator[int]:
    """The pages that have data."""
    from xipvm.address import PAGE_SHIFT, page_up

    page = 0
    for data, stored in runs:
        end = page + (page_up(len(data)) >> PAGE_SHIFT)
        if stored:
            yield from range(page, end)
        page = end


def _copy(runs: Iterator[tuple[bytes, bool]], file: XipFile, size: int) -> None:
    from xipvm.xip.open_file import OpenFile

    target = OpenFile(file)
    with _progress(size) as advance:
        for data, stored in runs:
            if stored:
                done = 0
                while done < len(data):  # what has no room is told by the call after the one that is short
                    done += target.put(data[done:])
            else:
                target.lseek(len(data), os.SEEK_CUR)
            advance(len(data))
    if target.pos > file.size:
        file.truncate(target.pos)


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr for a large file, where that is a terminal."""
    if size < _LARGE or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("put"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("put", total=size)
        yield lambda done: progress.advance(bar, done)
