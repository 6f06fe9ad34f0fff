"""Image files: making them, padding them, and what an image option on the command line means.

An option is ``FILE[,bank=N][,snapshot=on|off][,readonly=on|off]``; a comma in a file name is doubled, as in
QEMU. A file holds one bank, or all banks of the board in order; its size has to say which, to the byte.

A new image appears under its name complete or not at all: it is written under a hidden name and renamed
last. Padding appends, so a failed one is cut off again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from xipvm.address import format_size
from xipvm.devices.flash.image import FlashImage
from xipvm.errors import FlashImageError, os_reason
from xipvm.file_option import split_option
from xipvm.image_file import close_image, open_image

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each piece."""

_PIECE = 1 << 20
_ERASED = b"\xff" * _PIECE


class ImageOption(NamedTuple):
    """A parsed image option. ``bank`` None: the size of the file decides."""

    path: str
    bank: int | None = None
    snapshot: bool = False
    readonly: bool = False


class BankBytes(NamedTuple):
    """Where the bytes of one bank are: ``image``, from ``offset``."""

    image: FlashImage
    offset: int


def parse_option(text: str) -> ImageOption:
    """What ``FILE[,bank=N][,snapshot=on|off][,readonly=on|off]`` says. Raises FlashImageError."""
    path, settings = split_option(text)
    if not path:
        raise FlashImageError(text or '""', "no file is named; write FILE[,bank=N][,snapshot=on][,readonly=on]")
    bank: int | None = None
    switches = {"snapshot": False, "readonly": False}
    for setting, key, value in settings:
        if key == "bank" and value.isascii() and value.isdigit():
            bank = int(value)
        elif key in switches and value in ("on", "off"):
            switches[key] = value == "on"
        else:
            known = "bank=N, snapshot=on|off, readonly=on|off"
            raise FlashImageError(path, f"{setting!r} is no setting of a flash image; there are {known}")
    return ImageOption(path, bank, **switches)


def wanted_size(path: str, length: int, sizes: Sequence[int], bank: int | None = None) -> int:
    """The size to which a file of ``length`` bytes has to be padded. Raises FlashImageError when it is too long.

    ``sizes`` are those of the board's banks; ``bank`` is the one the file is for, None for bank 0 or all.
    """
    if bank is not None and bank >= len(sizes):
        raise FlashImageError(path, f"bank={bank}: the board has {_banks(sizes)}")
    for size in (sizes[0], sum(sizes)) if bank is None else (sizes[bank],):
        if length <= size:
            return size
    room = f"bank {bank} has {format_size(sizes[bank])}" if bank is not None else f"the board has {_banks(sizes)}"
    raise FlashImageError(path, f"has {length} bytes, too many: {room}")


def open_banks(options: Sequence[ImageOption], sizes: Sequence[int], *, board: str) -> list[BankBytes]:
    """The bytes of each bank of ``board``, whose banks have ``sizes`` bytes; erased where no option says more.

    Raises FlashImageError and leaves nothing open. The caller closes every image (once each).
    """
    found: list[BankBytes | None] = [None] * len(sizes)
    with contextlib.ExitStack() as opened:
        for option in options:
            first, count = _banks_of(option, sizes, board)
            for bank in range(first, first + count):
                if found[bank] is not None:
                    raise FlashImageError(option.path, f"bank {bank} has an image already; say bank=N")
            size = sum(sizes[first : first + count])
            image = FlashImage.open(option.path, size, snapshot=option.snapshot, readonly=option.readonly)
            opened.enter_context(image)
            offset = 0
            for bank in range(first, first + count):
                found[bank] = BankBytes(image, offset)
                offset += sizes[bank]
        banks = []
        for size, bytes_ in zip(sizes, found, strict=True):
            banks.append(bytes_ or BankBytes(opened.enter_context(FlashImage.erased(size)), 0))
        opened.pop_all()
    return banks


def create(path: str, size: int, *, force: bool = False, progress: Progress | None = None) -> None:
    """Write an erased image (0xFF) of ``size`` bytes.

    An existing file is replaced only with ``force``, and not while a run uses it. Raises FlashImageError; then
    nothing has changed.
    """
    try:
        target = os.path.realpath(path)
    except ValueError as error:
        raise FlashImageError(path, f"cannot be created: {error}") from None
    if os.path.lexists(target):
        if os.path.isdir(target):
            raise FlashImageError(path, os.strerror(errno.EISDIR))
        if not force:
            raise FlashImageError(path, "exists; --force replaces it")
    with contextlib.ExitStack() as held:
        if os.path.lexists(target):
            held.callback(close_image, open_image(path, FlashImageError, writable=False, shared=False))
        try:
            with _unfinished(os.path.dirname(target)) as (fd, finish):
                _append_erased(fd, 0, size, progress)
                finish(target, force)
        except FileExistsError:
            raise FlashImageError(path, "exists; --force replaces it") from None
        except OSError as error:
            raise FlashImageError(path, f"cannot be created: {_reason(error)}") from None


def pad(path: str, size: int, *, progress: Progress | None = None) -> int:
    """Append 0xFF to the file ``path`` until it has ``size`` bytes. Returns how many were added.

    Raises FlashImageError when it is longer, in use, or there is no room; then the file is as it was.
    """
    fd = open_image(path, FlashImageError, writable=True, shared=False)
    try:
        length = os.fstat(fd).st_size
        if length > size:
            raise FlashImageError(path, f"has {length} bytes already, more than {size} ({format_size(size)})")
        try:
            _append_erased(fd, length, size, progress)
        except BaseException as error:
            os.ftruncate(fd, length)
            if isinstance(error, OSError):
                raise FlashImageError(path, f"cannot be padded: {_reason(error)}") from None
            raise
        return size - length
    finally:
        close_image(fd)


def _banks_of(option: ImageOption, sizes: Sequence[int], board: str) -> tuple[int, int]:
    """The banks that an option's file fills: (first, count). Raises FlashImageError."""
    path = option.path
    if not sizes:
        raise FlashImageError(path, f"{board} has no flash")
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        info = None
    length = info.st_size if info is not None and stat.S_ISREG(info.st_mode) else -1  # opening it says why
    size = wanted_size(path, length, sizes, option.bank)
    if length not in (-1, size):
        both = "" if option.bank is not None or len(sizes) == 1 else f", all of its flash {sum(sizes)}"
        import shlex

        command = f"xipvm flash pad {shlex.quote(path)} --board {board}"
        if option.bank:
            command += f" --bank {option.bank}"
        bank = f"bank {option.bank or 0} of {board}" if len(sizes) > 1 else f"the flash of {board}"
        raise FlashImageError(path, f"has {length} bytes; {bank} has {sizes[option.bank or 0]}{both}: {command}")
    if option.bank is not None:
        return option.bank, 1
    return (0, 1) if length <= sizes[0] else (0, len(sizes))


def _banks(sizes: Sequence[int]) -> str:
    """``2 banks of 64 MiB``, or each size where they differ."""
    if not sizes:
        return "no flash"
    if len(sizes) == 1:
        return f"1 bank of {format_size(sizes[0])}"
    if len(set(sizes)) == 1:
        return f"{len(sizes)} banks of {format_size(sizes[0])}"
    return f"{len(sizes)} banks of " + ", ".join(map(format_size, sizes))


def _append_erased(fd: int, length: int, size: int, progress: Progress | None) -> None:
    """Write 0xFF over ``[length, size)`` of ``fd``."""
    done = length
    while done < size:
        done += os.pwrite(fd, _ERASED[: size - done], done)
        if progress is not None:
            progress(done - length, size - length)


def _reason(error: OSError) -> str:
    return "more than the limit on file sizes" if error.errno == errno.EFBIG else os_reason(error)


@contextlib.contextmanager
def _unfinished(directory: str) -> Iterator[tuple[int, Callable[[str, bool], None]]]:
    """A new file in ``directory`` under a hidden name, until ``finish(target, replace)`` gives it its own.

    ``finish`` raises FileExistsError when the target exists and may not be replaced.
    """
    hidden = os.path.join(directory, f".xipvm-{os.urandom(8).hex()}")
    fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def finish(target: str, replace: bool) -> None:
        if replace:
            os.replace(hidden, target)
            return
        try:
            os.link(hidden, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or os.path.lexists(target):
                raise
            os.rename(hidden, target)  # a file system without hard links

    try:
        yield fd, finish
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)
