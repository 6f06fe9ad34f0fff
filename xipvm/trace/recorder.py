"""Writes events into a trace file as they happen.

The file is extended ahead of the writer, 1 MiB at a time, by posix_fallocate (so that a full disk is an
error here, not a SIGBUS later) and written through a shared mapping of that last piece. What was
recorded is therefore in the kernel's hands at once: it survives the death of the process in any way,
at the price of one ``pack_into`` an event, and memory stays bounded. ``close`` writes the end record and
cuts the file to its length.

Each kind has an encoder of its own, generated from the schema when its first event comes (as namedtuple
generates its methods): a general one costs three times as much. Strings are replaced by numbers; the
definition of a new one goes before the event that needs it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import stat
import struct
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, SupportsIndex

from xipvm.errors import InternalError, TraceFileError, os_reason
from xipvm.trace.events import KINDS, RUN_TYPES, Event, Kind
from xipvm.trace.format import (
    END,
    END_RECORD,
    MAGIC,
    MARK,
    MAX_KINDS,
    MAX_RECORD,
    MAX_STRINGS,
    PREAMBLE,
    STRING,
    STRING_HEAD,
    TEXT_ERRORS,
    VERSION,
    fixed_part,
)

_STEP = 1 << 20
_SLACK = 512  # bytes that are always free in the window, so that the fixed part of a record needs no check

_Encoder = Callable[[mmap.mmap, int, Event], int]


class Recorder:
    """A sink (``trace.attach(recorder)``) that writes a trace file. A context manager; or call :meth:`close`.

    ``machine`` goes into the header; nothing in it may differ between two equal runs. ``append`` adds to an
    existing trace instead of replacing it. A file that is no trace is never replaced. With ``deferred``
    nothing is written before the first event, so that until then ``discard`` leaves everything as it was.

    When the disk is full or the file cannot grow otherwise, recording ends: ``error`` is set and ``on_error`` called
    with it once, from within the emit; later events are dropped. Without ``on_error`` the error is
    raised from that emit. The file keeps everything before and is readable, though marked as cut short.

    Raises TraceFileError when the file cannot be written or another recorder writes it. Recording
    raises InternalError for an event that its kind's declaration does not allow.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        machine: Mapping[str, Any] | None = None,
        append: bool = False,
        deferred: bool = False,
        on_error: Callable[[TraceFileError], None] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.error: TraceFileError | None = None
        self.events = 0
        """How many events were recorded."""
        self._on_error = on_error
        self._strings: dict[str | None, int] = {None: 0}
        kinds = dict(KINDS)
        if len(kinds) > MAX_KINDS:
            raise InternalError(f"{len(kinds)} kinds of events are declared, {MAX_KINDS} can be recorded")
        self._kinds = kinds
        self._encoders = _Encoders(kinds, self._strings, self._room)
        self._machine = dict(machine or {})
        self._created = not os.path.lexists(self.path)
        self._fd = _open(self.path)
        self._window: mmap.mmap | None = None
        self._base = self._at = 0  # where the window begins in the file; where the next record goes in the window
        self._limit = 0  # at and beyond this the window has to move before the next record
        try:
            if os.pread(self._fd, len(MAGIC), 0) not in (b"", MAGIC):
                raise TraceFileError(self.path, "exists and is no trace, so it is not replaced")
            if append:
                self._base = _end_of_trace(self.path)
            if not deferred:
                self._begin()
        except OSError as error:
            os.close(self._fd)
            raise TraceFileError(self.path, os_reason(error)) from error
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self) -> None:
        """Write the preamble and the header of a new segment. Raises OSError."""
        import json  # only a run that records pays for it

        header = json.dumps(
            {"kinds": {kind.name: kind.spec for kind in self._kinds.values()}, "machine": self._machine},
            separators=(",", ":"),
        ).encode()
        os.ftruncate(self._fd, self._base)
        window, at = self._move(PREAMBLE.size + len(header))
        PREAMBLE.pack_into(window, at, MAGIC, VERSION, len(header))
        self._at = at + PREAMBLE.size + len(header)
        window[at + PREAMBLE.size : self._at] = header

    def __call__(self, event: Event) -> None:
        """Record ``event``."""
        try:
            if self._at >= self._limit:
                if self.error is not None:
                    return
                if self._window is None and self._fd >= 0:
                    self._begin()
                self._move(_SLACK)
            try:
                self._at = self._encoders[event[4]](self._window, self._at, event)  # type: ignore[arg-type]
            except (KeyError, TypeError, struct.error):
                try:
                    self._check(event)
                except InternalError:
                    self._clear()
                    raise
                self._learn(event)
                self._at = self._encoders[event[4]](self._window, self._at, event)  # type: ignore[arg-type]
            self.events += 1
        except OSError as error:
            self._fail(error)

    def _fail(self, cause: OSError) -> None:
        reason = f"{os_reason(cause)}; it holds the run's first {self.events} events"
        self.error = error = TraceFileError(self.path, reason)
        self._limit = 0
        if self._on_error is None:
            raise error from cause
        self._on_error(error)

    def _room(self, size: int) -> tuple[mmap.mmap, int]:
        """The window and the place in it for a record of ``size`` bytes. Raises OSError, InternalError."""
        window = self._window
        if window is None or self._at + size > len(window) - _SLACK:
            return self._move(size)
        return window, self._at

    def _move(self, size: int) -> tuple[mmap.mmap, int]:
        """Map the piece of the file that begins at the next record and has place for ``size`` bytes."""
        if self._fd < 0:
            raise InternalError(f"{self.path}: an event came after the trace was closed")
        if size > MAX_RECORD:
            raise InternalError(f"{self.path}: a record of {size} bytes is too long for a trace")
        position = self._base + self._at
        base = position & -mmap.ALLOCATIONGRANULARITY
        end = -(-(position + size + _SLACK) // _STEP) * _STEP
        os.posix_fallocate(self._fd, base, end - base)
        window = mmap.mmap(self._fd, end - base, offset=base)
        if self._window is not None:
            self._window.close()
        self._window = window
        self._base = base
        self._at = position - base
        self._limit = len(window) - _SLACK
        return window, self._at

    def _learn(self, event: Event) -> None:
        """Define the strings of ``event`` that have no number yet."""
        texts = [event.actor]
        texts += [event.fields[field.name] for field in self._kinds[event.kind].fields if field.type == "str"]
        new = [text for text in dict.fromkeys(texts) if text not in self._strings]
        if len(self._strings) + len(new) > MAX_STRINGS:
            self._strings.clear()
            self._strings[None] = 0
            new = [text for text in dict.fromkeys(texts) if text is not None]
        for text in new:
            data = text.encode("utf-8", TEXT_ERRORS)
            size = STRING_HEAD.size + len(data) + 1
            window, at = self._room(size)
            number = len(self._strings)
            STRING_HEAD.pack_into(window, at, size, STRING, number)
            window[at + STRING_HEAD.size : at + size - 1] = data
            window[at + size - 1] = MARK
            self._strings[text] = number
            self._at = at + size
        self._room(_SLACK)

    def _clear(self) -> None:
        """Remove what was written of an event that turned out not to be one."""
        if self._window is not None:
            self._window[self._at :] = bytes(len(self._window) - self._at)

    def _check(self, event: Event) -> None:
        """Raise InternalError if ``event`` is not what its kind declares."""
        kind = self._kinds.get(event.kind)
        if kind is None:
            raise InternalError(f"event {event.kind} is not declared")
        names = [field.name for field in kind.fields]
        if set(names) != set(event.fields):
            raise InternalError(f"event {event.kind} has fields {sorted(event.fields)}, it is declared with {names}")
        for field in kind.fields:
            value = event.fields[field.name]
            if not _fits(value, field.type, field.optional):
                raise InternalError(f"event {event.kind}: {value!r} is no {field.type} for {field.name}")
        if not isinstance(event.actor, str):
            raise InternalError(f"event {event.kind}: {event.actor!r} is no actor")
        for value in (event.seq, event.time, event.cause):
            if not _fits(value, "hex", False):
                raise InternalError(f"event {event.kind}: {value!r} is no sequence number or time")

    def close(self) -> None:
        """Finish the file. Closing twice is allowed. Raises TraceFileError; the file is closed all the same."""
        if self._fd < 0:
            return
        failed: OSError | None = None
        if self._window is None and self.error is None:
            try:
                self._begin()
            except OSError as error:
                failed = error
        fd, self._fd = self._fd, -1
        window, self._window = self._window, None
        try:
            if failed is not None:
                raise failed
            if window is not None:
                if self.error is None:  # the slack has place for it
                    END_RECORD.pack_into(window, self._at, END_RECORD.size, END, self.events, MARK)
                    self._at += END_RECORD.size
                window.close()
            os.ftruncate(fd, self._base + self._at)
        except OSError as error:
            raise TraceFileError(self.path, os_reason(error)) from error
        finally:
            self._limit = self._at = 0
            os.close(fd)

    def discard(self) -> None:
        """Close the file as it was found, or remove it if it was not there. With events recorded it is ``close``."""
        if self._fd < 0 or self._window is not None or self.error is not None:
            self.close()
            return
        fd, self._fd = self._fd, -1
        if self._created:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(fd)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _open(path: str) -> int:
    """A descriptor of the regular file ``path``, created if need be, locked against other recorders."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise TraceFileError(path, os_reason(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise TraceFileError(path, "a trace is recorded into a regular file, and this is none")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise TraceFileError(path, "another run is recording into it") from error
    except TraceFileError:
        os.close(fd)
        raise
    return fd


def _end_of_trace(path: str) -> int:
    """Where a new segment may begin in the trace ``path``. Raises TraceFileError unless it is sound up to there."""
    from xipvm.trace.reader import TraceReader

    if os.path.getsize(path) == 0:
        return 0
    with TraceReader(path) as reader:
        for _ in reader:
            pass
        return reader.offset


def _fits(value: object, type_: str, optional: bool) -> bool:
    if type_ == "str":
        return value is None or isinstance(value, str)
    if type_ == "bool":
        return isinstance(value, int) and 0 <= value <= 1
    if type_ in RUN_TYPES:
        return isinstance(value, (list, tuple)) and all(
            isinstance(run, (list, tuple)) and len(run) == 2 and all(_fits(number, "hex", False) for number in run)
            for run in value
        )
    if value is None:
        return optional
    low = -(1 << 63) if type_ == "int" else 0
    return isinstance(value, SupportsIndex) and low <= value.__index__() < low + (1 << 64)


class _Encoders(dict[str, _Encoder]):
    """The encoders by kind, made when first asked for; KeyError for a kind that is not declared."""

    def __init__(
        self, kinds: dict[str, Kind], strings: dict[str | None, int], room: Callable[[int], tuple[mmap.mmap, int]]
    ) -> None:
        super().__init__()
        self._kinds = kinds
        self._numbers = {name: number for number, name in enumerate(kinds)}
        self._strings = strings
        self._room = room

    def __missing__(self, name: str) -> _Encoder:
        kind = self._kinds[name]
        self[name] = encoder = _encoder(self._numbers[name], kind, self._strings, self._room)
        return encoder


def _encoder(
    number: int, kind: Kind, strings: dict[str | None, int], room: Callable[[int], tuple[mmap.mmap, int]]
) -> _Encoder:
    """The function that packs an event of ``kind`` into a buffer at an offset and returns the offset behind it."""
    values = []
    runs = []
    for name, type_, optional in kind.fields:
        value = f"f[{name!r}]"
        if type_ in RUN_TYPES:
            runs.append(value)
        elif type_ == "str":
            values.append(f"strings[{value}]")
        elif optional:
            values.append(f"{value} is not None, {value} or 0")
        else:
            values.append(value)
    codes = fixed_part(kind)
    fixed = struct.Struct(f"<{codes}" if runs else f"<{codes}B")
    if fixed.size > _SLACK:
        raise InternalError(f"event kind {kind.name} has too many fields to be recorded")
    body = ["    seq, time, actor, cause, _, f = event", f"    if len(f) != {len(kind.fields)}: raise KeyError"]
    head = f"{number}, strings[actor], seq, time, cause"
    if runs:
        counts = [f"len({value})" for value in runs]
        body += [
            f"    count = {' + '.join(counts)}",
            f"    size = {fixed.size + 1} + 16 * count",
            f"    if size > {_SLACK}: buffer, at = room(size)",
            f"    pack_into(buffer, at, {', '.join(['size', head, *values, *counts])})",
            f"    numbers = chain.from_iterable(chain({', '.join(runs)}))",
            f"    tail(count).pack_into(buffer, at + {fixed.size}, *numbers, {MARK})",
            "    return at + size",
        ]
    else:
        body += [
            f"    pack_into(buffer, at, {', '.join([str(fixed.size), head, *values, str(MARK)])})",
            f"    return at + {fixed.size}",
        ]
    scope: dict[str, Any] = {
        "strings": strings,
        "room": room,
        "pack_into": fixed.pack_into,
        "chain": itertools.chain,
        "tail": _tail,
    }
    exec("\n".join(["def encode(buffer, at, event):", *body]), scope)
    encode: _Encoder = scope["encode"]
    return encode


_tails = [struct.Struct(f"<{2 * count}QB") for count in range(17)]


def _tail(count: int) -> struct.Struct:
    """Packs ``count`` runs and the mark."""
    return _tails[count] if count < len(_tails) else struct.Struct(f"<{2 * count}QB")
