"""Reads trace files, front to back, in bounded memory.

Every segment is read with the schema that it carries. Iterating yields events until the file ends in
one of three ways: behind an end record (the recorder was closed: ``closed`` is true), at a record of length 0
(the recording process died; everything it had emitted is there), or with TraceFileError: cut short, corrupt.
Damage is found by structure (lengths, kinds, marks, order); a flipped bit in a field's value is not.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from xipvm.errors import TraceFileError, os_reason
from xipvm.trace.events import RUN_TYPES, Event, Kind, parse_kind
from xipvm.trace.format import (
    END,
    END_RECORD,
    HEAD,
    MAGIC,
    MARK,
    MAX_KINDS,
    MAX_RECORD,
    PREAMBLE,
    STRING,
    STRING_HEAD,
    TEXT_ERRORS,
    VERSION,
    fixed_part,
)

_CHUNK = 1 << 20

_Decoder = Callable[[bytes], Event]


class TraceReader:
    """The events of the trace file ``path``: iterate once. A context manager; or call :meth:`close`.

    Raises TraceFileError at once when the file is no trace, and while iterating, behind the last sound event,
    when it is cut short or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.kinds: dict[str, Kind] = {}
        """The schema of the segment that is being read."""
        self.machine: dict[str, Any] = {}
        """What the recorder of that segment was told about its machine."""
        self._decoders: list[_Decoder] = []
        self._strings: dict[int, str | None] = {}
        self._ended = True  # the present segment is; there is none yet
        self._all_ended = True  # all before it are
        self._seq = self._events = 0  # of the present segment
        self._data = b""
        self._at = 0  # of _data: the next record
        self._base = 0  # of the file: _data
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (close() closes it)
        except OSError as error:
            raise TraceFileError(self.path, os_reason(error)) from error
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Every segment up to here was closed by its recorder."""
        return self._ended and self._all_ended

    @property
    def offset(self) -> int:
        """Where the next record is in the file."""
        return self._base + self._at

    def __iter__(self) -> Iterator[Event]:
        while self._have(4):
            size = int.from_bytes(self._data[self._at : self._at + 4], "little")
            if size == 0:
                return
            if size > MAX_RECORD:
                self._begin()
                continue
            record = self._record(size)
            if record is None:
                return
            kind = HEAD.unpack_from(record)[1]
            event = None
            try:
                if kind == STRING:
                    number = STRING_HEAD.unpack_from(record)[2]
                    self._strings[number] = record[STRING_HEAD.size : -1].decode("utf-8", TEXT_ERRORS)
                elif kind == END:
                    if END_RECORD.unpack(record)[2] != self._events:
                        raise self._corrupt()
                    self._ended = True
                else:
                    event = self._decoders[kind](record)
                    if event.seq <= self._seq:
                        raise self._corrupt()
            except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
                raise self._corrupt() from error
            self._at += size
            if event is not None:
                self._seq = event.seq
                self._events += 1
                yield event
        if not self._ended or self._have(1):
            raise TraceFileError(self.path, f"cut short at offset {self.offset}")

    def _begin(self) -> None:
        """Read the preamble and the header of a segment."""
        first = self.offset == 0
        known = self._have(len(MAGIC))
        if self._data[self._at : self._at + len(MAGIC)] != MAGIC[: None if known else len(self._data) - self._at]:
            raise TraceFileError(self.path, "not an xipvm trace") if first else self._corrupt()
        if not self._have(1):
            raise TraceFileError(self.path, "not an xipvm trace: it is empty")
        if self._have(len(MAGIC) + 2):
            version = int.from_bytes(self._data[self._at + len(MAGIC) : self._at + len(MAGIC) + 2], "little")
            if version != VERSION:
                raise TraceFileError(self.path, f"trace format version {version}; this xipvm reads version {VERSION}")
        if not self._have(PREAMBLE.size):
            raise TraceFileError(self.path, f"cut short at offset {self.offset}")
        length = PREAMBLE.unpack_from(self._data, self._at)[2]
        if length > MAX_RECORD:
            raise self._corrupt()
        if not self._have(PREAMBLE.size + length):
            raise TraceFileError(self.path, f"cut short at offset {self.offset}")
        start = self._at + PREAMBLE.size
        try:
            header = json.loads(self._data[start : start + length])
            kinds = [parse_kind(name, spec) for name, spec in header["kinds"].items()]
            machine = dict(header["machine"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._corrupt() from error
        if len(kinds) > MAX_KINDS:
            raise self._corrupt()
        self._at += PREAMBLE.size + length
        self._all_ended &= self._ended
        self._ended = False
        self._seq = self._events = 0
        self.machine = machine
        self.kinds = {kind.name: kind for kind in kinds}
        self._strings = {0: None}
        self._decoders = [_decoder(kind, self._strings) for kind in kinds]

    def _record(self, size: int) -> bytes | None:
        """The record at ``_at``; None if its writer died over it. Raises TraceFileError."""
        if self._ended or size <= HEAD.size:
            raise self._corrupt()
        if not self._have(size):
            raise TraceFileError(self.path, f"cut short at offset {self.offset}")
        record = self._data[self._at : self._at + size]
        if record[-1] != MARK:
            if record[-1] == 0 and self._only_zeros_behind(size):
                return None
            raise self._corrupt()
        return record

    def _only_zeros_behind(self, size: int) -> bool:
        rest = self._data[self._at + size :]
        while rest:
            if rest.count(0) != len(rest):
                return False
            rest = self._read(_CHUNK)
        return True

    def _have(self, size: int) -> bool:
        """Whether there are ``size`` bytes at ``_at``; they are in ``_data`` then."""
        missing = self._at + size - len(self._data)
        if missing <= 0:
            return True
        pieces = [self._data[self._at :]]
        self._base += self._at
        self._at = 0
        while missing > 0 and (piece := self._read(max(missing, _CHUNK))):
            pieces.append(piece)
            missing -= len(piece)
        self._data = b"".join(pieces)
        return missing <= 0

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size) or b""
        except OSError as error:
            raise TraceFileError(self.path, os_reason(error)) from error

    def _corrupt(self) -> TraceFileError:
        return TraceFileError(self.path, f"corrupt record at offset {self.offset}")

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _decoder(kind: Kind, strings: dict[int, str | None]) -> _Decoder:
    """The function that makes an event of a record of ``kind``; raises KeyError, IndexError or struct.error."""
    fixed = struct.Struct("<" + fixed_part(kind))
    keys: list[str] = []  # of the values that `fixed` gives; "?name" says whether an optional number is there
    for name, type_, optional in kind.fields:
        if type_ not in RUN_TYPES:
            keys += [f"?{name}", name] if optional else [name]
    texts = [field.name for field in kind.fields if field.type == "str"]
    booleans = [field.name for field in kind.fields if field.type == "bool"]
    optionals = [field.name for field in kind.fields if field.optional]
    runs = [field.name for field in kind.fields if field.type in RUN_TYPES]
    keys += runs
    fixed_size = fixed.size + 1

    def decode(record: bytes) -> Event:
        _, _, actor, seq, time, cause, *values = fixed.unpack_from(record)
        fields: dict[str, Any] = dict(zip(keys, values, strict=True))
        for name in texts:
            fields[name] = strings[fields[name]]
        for name in booleans:
            fields[name] = bool(fields[name])
        for name in optionals:
            if not fields.pop(f"?{name}"):
                fields[name] = None
        size = fixed_size
        for name in runs:
            count = fields[name]
            numbers = struct.unpack_from(f"<{2 * count}Q", record, size - 1)
            fields[name] = list(zip(numbers[::2], numbers[1::2], strict=True))
            size += 16 * count
        if size != len(record):
            raise IndexError
        who = strings[actor]
        if who is None:
            raise KeyError
        return Event(seq, time, who, cause, kind.name, fields)

    return decode
