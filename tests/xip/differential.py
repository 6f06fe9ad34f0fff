"""Random operations on an XIP file and on an ordinary file of the host: the same bytes, sizes and errors.

    python -m tests.xip.differential --count 50000

Each sequence begins with an empty file and does some operations on both: read, write, append, truncate, a hole punched,
mapped privately and shared, read and written through the mappings, msync, also with buffers that end in the middle of
what is asked for, and under limits to the size of files (RLIMIT_FSIZE). What a mapping shows behind the end of the file
is an error in one and would end the process in the other, so that is asked of the XIP file alone.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import random
import resource
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE

from xipvm.address import PAGE_SIZE, page_up
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace
from xipvm.xip.dax import DaxFile
from xipvm.xip.filemap import XipFile
from xipvm.xip.host_file import HostInode
from xipvm.xip.inode import XipInode
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import open_volume

PAGES = 6
_RW = PROT_READ | PROT_WRITE
_PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.read.argtypes = _libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_libc.read.restype = _libc.write.restype = ctypes.c_ssize_t

_OPERATIONS = (
    *("read", "write", "write", "append", "append", "truncate", "punch", "limit"),
    *("map", "load", "store", "store", "sync"),
)
CONFIGS = ("host 2008", "host modern", "ext2 2008", "ext2 modern")
_FORMS: dict[str, type[XipFile]] = {"2008": XipFile, "modern": DaxFile}


class Different(AssertionError):
    """The two did not do the same; the operations are in the message."""


@contextmanager
def limited(fsize: int) -> Iterator[None]:
    """For one call of the host's: this RLIMIT_FSIZE, and SIGXFSZ ignored. Nothing else may write to files meanwhile."""
    before = resource.getrlimit(RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(RLIMIT_FSIZE, (fsize, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class Ordinary:
    """The host's own file, with a buffer of two pages of which the second cannot be used."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.reading = os.open(path, os.O_RDONLY)
        self.appending = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.fsize = RLIM_INFINITY
        self.maps: dict[str, int] = {}
        self.buffer = self._map(2 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        _libc.munmap(self.buffer + PAGE_SIZE, PAGE_SIZE)

    def close(self) -> None:
        self.reset()
        _libc.munmap(self.buffer, PAGE_SIZE)
        for fd in (self.fd, self.reading, self.appending):
            os.close(fd)

    def reset(self) -> None:
        for address in self.maps.values():
            _libc.munmap(address, PAGES * PAGE_SIZE)
        self.maps.clear()
        self.fsize = RLIM_INFINITY
        os.ftruncate(self.fd, 0)

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def read(self, pos: int, count: int, room: int) -> bytes:
        os.lseek(self.fd, pos, os.SEEK_SET)
        at = self.buffer + PAGE_SIZE - room
        done = self._checked(_libc.read(self.fd, at, count))
        assert os.lseek(self.fd, 0, os.SEEK_CUR) == pos + done
        return ctypes.string_at(at, done)

    def write(self, pos: int, data: bytes, count: int, *, append: bool) -> tuple[int, int]:
        fd = self.appending if append else self.fd
        os.lseek(fd, pos, os.SEEK_SET)
        at = self.buffer + PAGE_SIZE - len(data)
        ctypes.memmove(at, data, len(data))
        with limited(self.fsize):
            done = _libc.write(fd, at, count)
        return self._checked(done), os.lseek(fd, 0, os.SEEK_CUR)

    def write_read_only(self, data: bytes) -> int:
        return os.write(self.reading, data)

    def truncate(self, size: int) -> None:
        with limited(self.fsize):
            os.ftruncate(self.fd, size)

    def punch(self, page: int, count: int) -> None:
        with limited(self.fsize):
            done = _libc.fallocate(self.fd, _PUNCH, page * PAGE_SIZE, count * PAGE_SIZE)
        self._checked(done)

    def limit(self, fsize: int) -> None:
        self.fsize = fsize

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def map(self, kind: str) -> None:
        flags = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
        self.maps[kind] = self._map(PAGES * PAGE_SIZE, flags, self.fd)

    def unmap(self, kind: str) -> None:
        _libc.munmap(self.maps.pop(kind), PAGES * PAGE_SIZE)

    def load(self, kind: str, at: int, count: int) -> bytes:
        return ctypes.string_at(self.maps[kind] + at, count)

    def store(self, kind: str, at: int, data: bytes) -> None:
        ctypes.memmove(self.maps[kind] + at, data, len(data))

    @staticmethod
    def _map(size: int, flags: int, fd: int) -> int:
        return int(_libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0))

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result


class InPlace:
    """The XIP file, in the memory of a process of the model."""

    def __init__(self, host: HostMemory, mm: Mm, file: XipFile) -> None:
        self.mm = mm
        self.file = file
        self.handle = OpenFile(file)
        self.appending = OpenFile(file, os.O_WRONLY | os.O_APPEND)
        self.reading = OpenFile(file, os.O_RDONLY)
        self.maps: dict[str, int] = {}
        self.buffer = mm.mmap(2 * PAGE_SIZE, _RW, MAP_PRIVATE | MAP_ANONYMOUS)
        mm.munmap(self.buffer + PAGE_SIZE, PAGE_SIZE)

    def reset(self) -> None:
        for kind in list(self.maps):
            self.unmap(kind)
        self.limit(RLIM_INFINITY)
        self.file.truncate(0)

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, pos: int, count: int, room: int) -> bytes:
        at = self.buffer + PAGE_SIZE - room
        self.handle.lseek(pos)
        done = self.handle.read(self.mm, at, count)
        assert self.handle.pos == pos + done
        return self.mm.read(at, done)

    def write(self, pos: int, data: bytes, count: int, *, append: bool) -> tuple[int, int]:
        at = self.buffer + PAGE_SIZE - len(data)
        self.mm.write(at, data)
        handle = self.appending if append else self.handle
        handle.lseek(pos)
        return handle.write(self.mm, at, count), handle.pos

    def write_read_only(self, data: bytes) -> int:
        return self.reading.put(data)

    def truncate(self, size: int) -> None:
        self.handle.truncate(size)

    def limit(self, fsize: int) -> None:
        self.handle.fsize = self.appending.fsize = self.reading.fsize = fsize

    def punch(self, page: int, count: int) -> None:
        self.file.punch_hole(page, count)

    def sync(self) -> None:
        self.file.fsync()

    def map(self, kind: str) -> None:
        flags = MAP_SHARED if kind == "shared" else MAP_PRIVATE
        self.maps[kind] = self.mm.mmap(PAGES * PAGE_SIZE, _RW, flags, file=self.file)

    def unmap(self, kind: str) -> None:
        self.mm.munmap(self.maps.pop(kind), PAGES * PAGE_SIZE)

    def load(self, kind: str, at: int, count: int) -> bytes:
        return self.mm.read(self.maps[kind] + at, count)

    def store(self, kind: str, at: int, data: bytes) -> None:
        self.mm.write(self.maps[kind] + at, data)


class Pair:
    """Both files of one configuration, used again for every sequence."""

    def __init__(self, directory: Path, config: str) -> None:
        system, form = config.split()
        self.host = HostMemory(1 << 20)
        trace = Trace()
        self.mm = Mm(self.host, trace, protocol=form)
        inode: XipInode
        if system == "host":
            path = directory / "in-place"
            path.touch()
            host_inode = HostInode(self.host, str(path))
            inode, self._close = host_inode, host_inode.close
            self.image = None
        else:
            self.image = directory / "fs.ext2"
            command = ["mke2fs", "-q", "-t", "ext2", "-b", "4096", str(self.image), "1M"]
            subprocess.run(command, check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
            volume = open_volume(self.host, str(self.image))
            inode, self._close = volume.create("/in-place"), volume.close
        self.ours = InPlace(self.host, self.mm, _FORMS[form](self.host, trace, inode))
        self.theirs = Ordinary(str(directory / "ordinary"))

    def close(self) -> None:
        self.mm.exit()
        self._close()
        self.theirs.close()
        self.host.close()

    def run(self, seed: int, length: int) -> Counter[str]:
        """One sequence. Raises Different. Counts the operations, and the errors by name."""
        choose = random.Random(seed)
        done: list[str] = []
        counts: Counter[str] = Counter()
        self.ours.reset()
        self.theirs.reset()
        for _ in range(length):
            name, ours, theirs = self._operation(choose)
            done.append(name)
            got, wanted = _outcome(ours), _outcome(theirs)
            counts[name.partition("(")[0]] += 1
            if isinstance(got, int) and got < 0:
                counts[errno.errorcode[-got]] += 1
            if got != wanted or self.ours.size != self.theirs.size:
                sizes = f"sizes {self.ours.size} and {self.theirs.size}"
                raise Different(f"seed {seed}: {'; '.join(done)}: {_short(got)} instead of {_short(wanted)}; {sizes}")
        size = self.theirs.size
        whole = bytes(self._all(self.ours.read, size))
        if whole != bytes(self._all(self.theirs.read, size)):
            raise Different(f"seed {seed}: {'; '.join(done)}: the files have different bytes in the end")
        return counts

    @staticmethod
    def _all(read: Callable[[int, int, int], bytes], size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            data += read(len(data), min(PAGE_SIZE, size - len(data)), PAGE_SIZE)
        return data

    def _operation(self, choose: random.Random) -> tuple[str, Callable[[], object], Callable[[], object]]:
        """An operation: what it is, and how to do it to either."""
        ours, theirs = self.ours, self.theirs
        kind = choose.choice(("shared", "private"))
        what = choose.choice(_OPERATIONS)
        if what == "read":
            pos, count = choose.randrange(PAGES * PAGE_SIZE), choose.choice((0, 1, 100, 4096, 5000))
            room = choose.choice((PAGE_SIZE, PAGE_SIZE, 0, 60))
            return (
                f"read({pos}, {count}, room {room})",
                lambda: ours.read(pos, count, room),
                lambda: theirs.read(pos, count, room),
            )
        if what in ("write", "append"):
            pos = choose.randrange((PAGES - 1) * PAGE_SIZE)
            data = choose.randbytes(choose.choice((0, 1, 60, 1000, PAGE_SIZE)))
            count = len(data) + choose.choice((0, 0, 0, 50))
            append = what == "append" and theirs.size < (PAGES - 1) * PAGE_SIZE
            if what == "append" and not append:
                return "write_read_only()", lambda: ours.write_read_only(b"x"), lambda: theirs.write_read_only(b"x")
            return (
                f"{what}({pos}, {len(data)} of {count})",
                lambda: ours.write(pos, data, count, append=append),
                lambda: theirs.write(pos, data, count, append=append),
            )
        if what == "limit":
            fsize = choose.choice(
                (RLIM_INFINITY, choose.randrange(PAGES * PAGE_SIZE), choose.randrange(PAGES) * PAGE_SIZE)
            )
            return f"limit({fsize})", lambda: ours.limit(fsize), lambda: theirs.limit(fsize)
        if what == "truncate":
            size = choose.choice((0, choose.randrange(PAGES * PAGE_SIZE), choose.randrange(PAGES) * PAGE_SIZE, -1))
            return f"truncate({size})", lambda: ours.truncate(size), lambda: theirs.truncate(size)
        if what == "punch":
            page, count = choose.randrange(PAGES), choose.choice((0, 1, 1, 2))
            return f"punch({page}, {count})", lambda: ours.punch(page, count), lambda: theirs.punch(page, count)
        if what == "sync":
            return "sync()", lambda: ours.sync(), lambda: theirs.sync() if choose.random() < 0.02 else None
        if kind not in theirs.maps:
            return f"map({kind})", lambda: ours.map(kind), lambda: theirs.map(kind)
        if what == "map":
            return f"unmap({kind})", lambda: ours.unmap(kind), lambda: theirs.unmap(kind)
        end = page_up(theirs.size)
        if not end or choose.random() < 0.05:
            at = end + choose.randrange(PAGE_SIZE)
            if at < PAGES * PAGE_SIZE:  # SIGBUS
                return f"load({kind}, {at}) behind the end", lambda: ours.load(kind, at, 1), lambda: -errno.EFAULT
            return "sync()", lambda: ours.sync(), lambda: None
        if what == "store" and theirs.size:
            at = choose.randrange(theirs.size)
            data = choose.randbytes(min(choose.choice((1, 16, 3000)), theirs.size - at))
            return (
                f"store({kind}, {at}, {len(data)})",
                lambda: ours.store(kind, at, data),
                lambda: theirs.store(kind, at, data),
            )
        at = choose.randrange(end)
        count = min(choose.choice((1, 64, 5000)), end - at)
        return (
            f"load({kind}, {at}, {count})",
            lambda: ours.load(kind, at, count),
            lambda: theirs.load(kind, at, count),
        )


def _outcome(call: Callable[[], object]) -> object:
    """What came of a call: its result, or the error as a negative number."""
    try:
        return call()
    except (MmError, OSError) as error:
        return -(error.errno or 0)


def _short(outcome: object) -> str:
    if isinstance(outcome, int) and outcome < 0:
        return errno.errorcode[-outcome]
    text = repr(outcome)
    return text if len(text) < 80 else text[:77] + "..."


def main() -> None:
    """Runs sequences on all configurations, and says what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="sequences, over all configurations")
    parser.add_argument("--length", type=int, default=20, help="operations in each")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    for config in CONFIGS:
        with tempfile.TemporaryDirectory() as directory:
            pair = Pair(Path(directory), config)
            for seed in range(options.first, options.first + options.count // len(CONFIGS)):
                counts += pair.run(seed, options.length)
            pair.close()
        print(f"{config}: no difference")
    print(", ".join(f"{name} {count}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main()
