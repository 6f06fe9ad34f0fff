"""Reads ELF files: what a loader needs of them, and symbols for reports.

A small reader of our own: importing pyelftools costs more time than the rest of a short run, and
it raises whatever a damaged file makes it stumble over. Here a file is either understood or refused with one
GuestImageError that says what is wrong; nothing in it is trusted. Symbols are read when first asked for, and a
damaged symbol table only means that there are none.
"""

from __future__ import annotations

import os
import stat
import struct
from bisect import bisect_right
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from xipvm.errors import GuestImageError, os_reason

PF_X, PF_W, PF_R = 1, 2, 4
PT_LOAD, PT_INTERP = 1, 3
ET_EXEC, ET_DYN = 2, 3

MACHINES = {3: "x86", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}
_OTHER_TYPES = {0: "no type of file", 1: "an unlinked object file", 4: "a core dump"}

_HEADERS = {32: struct.Struct("<16sHHIIIIIHHHHHH"), 64: struct.Struct("<16sHHIQQQIHHHHHH")}
_SEGMENTS = {32: struct.Struct("<8I"), 64: struct.Struct("<2I6Q")}
_SECTIONS = {32: struct.Struct("<10I"), 64: struct.Struct("<2I4Q2I2Q")}
_SYMBOLS = {32: struct.Struct("<3I2BH"), 64: struct.Struct("<I2BH2Q")}

_SHT_SYMTAB = 2
_SHN_UNDEF, _SHN_COMMON = 0, 0xFFF2
_STT_NOTYPE, _STT_OBJECT, _STT_FUNC = 0, 1, 2
_MAX_FILE = 1 << 30


def rwx(flags: int) -> str:
    """``PF_R | PF_W | PF_X`` as ``r-x``."""
    return "".join(letter if flags & bit else "-" for letter, bit in (("r", PF_R), ("w", PF_W), ("x", PF_X)))


class Segment(NamedTuple):
    """A PT_LOAD program header. Addresses and sizes in bytes; ``flags`` are ``PF_R | PF_W | PF_X``."""

    number: int
    """Place in the program header table."""
    vaddr: int
    paddr: int
    flags: int
    data: memoryview
    """What the file holds of it: p_filesz bytes."""
    memsz: int
    """Its size in memory, at least ``len(data)``; the rest is zero."""
    offset: int
    """Where ``data`` begins in the file."""


class Symbol(NamedTuple):
    """A symbol with an address. ``size`` is 0 where the file does not tell."""

    name: str
    address: int
    size: int
    function: bool


class ElfImage:
    """An ELF file that was checked: every segment lies in the file, none wraps around the address space or overlaps.

    ``segments`` are the non-empty PT_LOAD ones in file order, at least one; ``entry`` is e_entry as it stands,
    a virtual address; ``bits`` is 32 or 64; ``machine`` is e_machine; ``position_independent`` tells ET_DYN.
    """

    def __init__(self, data: bytes, path: str = "<memory>") -> None:
        """Read the file's bytes. ``path`` is what errors call it. Raises GuestImageError."""
        self.path = path
        self._view = view = memoryview(data)
        if bytes(view[:4]) != b"\x7fELF":
            raise self._error("is not an ELF file" if len(view) else "is empty")
        ident = bytes(view[:7])
        if len(ident) < 7:
            raise self._error(f"is cut short: {len(view)} bytes are no ELF header")
        self.bits = {1: 32, 2: 64}.get(ident[4], 0)
        if not self.bits:
            raise self._error(f"has an unknown ELF class {ident[4]}")
        if ident[5] != 1:
            raise self._error("is big-endian; guests are little-endian" if ident[5] == 2 else "has no known byte order")
        header = _HEADERS[self.bits]
        if len(view) < header.size:
            raise self._error(f"is cut short: {len(view)} bytes are no ELF header")
        (_, type_, self.machine, version, self.entry, phoff, self._shoff, self.flags, _, phentsize, phnum,
         self._shentsize, self._shnum, _) = header.unpack_from(view)  # fmt: skip
        if version != 1:
            raise self._error(f"has an unknown ELF version {version}")
        if type_ not in (ET_EXEC, ET_DYN):
            raise self._error(f"is {_OTHER_TYPES.get(type_, f'of ELF type {type_}')}, not an executable")
        self.position_independent = type_ == ET_DYN
        self.segments = self._read_segments(phoff, phentsize, phnum)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ElfImage:
        """Read the file ``path``. Raises GuestImageError."""
        name = os.fspath(path)
        try:
            # Non-blocking, so that opening a FIFO does not wait for a writer.
            with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode):
                    raise GuestImageError(name, "is not a regular file")
                if info.st_size > _MAX_FILE:
                    raise GuestImageError(name, f"is larger than {_MAX_FILE >> 30} GiB")
                data = file.readall()
        except OSError as error:
            raise GuestImageError(name, os_reason(error)) from error
        return cls(data, name)

    def _error(self, reason: str) -> GuestImageError:
        return GuestImageError(self.path, reason)

    def _read_segments(self, offset: int, entry_size: int, count: int) -> tuple[Segment, ...]:
        layout = _SEGMENTS[self.bits]
        if count == 0:
            raise self._error("has no program headers, so nothing to load")
        if entry_size != layout.size:
            raise self._error(f"has program headers of {entry_size} bytes, not {layout.size}")
        if offset + count * entry_size > len(self._view):
            raise self._error(f"is cut short: its {count} program headers at {offset:#x} lie beyond its end")
        space = 1 << self.bits
        segments = []
        for index, fields in enumerate(layout.iter_unpack(self._view[offset : offset + count * entry_size])):
            if self.bits == 64:
                type_, flags, start, vaddr, paddr, filesz, memsz, _ = fields
            else:
                type_, start, vaddr, paddr, filesz, memsz, flags, _ = fields
            if type_ == PT_INTERP:
                raise self._error("is dynamically linked: it needs an interpreter that no board has")
            if type_ != PT_LOAD or not memsz | filesz:
                continue
            if filesz > memsz:
                raise self._error(f"segment {index} is larger in the file ({filesz:#x}) than in memory ({memsz:#x})")
            if start + filesz > len(self._view):
                raise self._error(f"is cut short: segment {index} ends at {start + filesz:#x} of {len(self._view):#x}")
            if max(vaddr, paddr) + memsz > space:
                raise self._error(f"segment {index} of {memsz:#x} bytes reaches beyond the address space")
            segments.append(Segment(index, vaddr, paddr, flags & 7, self._view[start : start + filesz], memsz, start))
        if not segments:
            raise self._error("has no loadable segment")
        for what, ordered in (
            ("physical", sorted((segment.paddr, len(segment.data), segment.number) for segment in segments)),
            ("virtual", sorted((segment.vaddr, segment.memsz, segment.number) for segment in segments)),
        ):
            for (low, size, first), (high, other, second) in pairwise(ordered):
                if low + size > high and other:
                    raise self._error(f"segments {first} and {second} overlap at {what} address {high:#x}")
        return tuple(segments)

    @cached_property
    def symbols(self) -> tuple[Symbol, ...]:
        """Functions, objects and labels by ascending address; empty when the file has none or they are damaged."""
        try:
            return tuple(sorted(self._read_symbols(), key=lambda symbol: (symbol.address, symbol.function)))
        except struct.error:
            return ()

    def _read_symbols(self) -> list[Symbol]:
        layout = _SECTIONS[self.bits]
        if self._shentsize != layout.size or self._shoff + self._shnum * layout.size > len(self._view):
            return []
        table = self._view[self._shoff : self._shoff + self._shnum * layout.size]
        sections = [(fields[1], *fields[4:7]) for fields in layout.iter_unpack(table)]
        symbols = []
        for type_, offset, size, link in sections:
            if type_ != _SHT_SYMTAB or link >= len(sections):
                continue
            _, names_at, names_size, _ = sections[link]
            names = bytes(self._view[names_at : names_at + names_size])
            entry = _SYMBOLS[self.bits]
            usable = self._view[offset : offset + size]
            for fields in entry.iter_unpack(usable[: len(usable) - len(usable) % entry.size]):
                if self.bits == 64:
                    name_at, info, _, section, value, length = fields
                else:
                    name_at, value, length, info, _, section = fields
                kind = info & 15
                if kind > _STT_FUNC or section in (_SHN_UNDEF, _SHN_COMMON) or not 0 < name_at < len(names):
                    continue
                name = names[name_at : names.find(b"\0", name_at)].decode("utf-8", "backslashreplace")
                if name and not name.startswith("$"):  # $x, $d: the assembler's mapping symbols
                    symbols.append(Symbol(name, value, length, kind == _STT_FUNC))
        return symbols

    @cached_property
    def _addresses(self) -> list[int]:
        return [symbol.address for symbol in self.symbols]

    def describe(self, address: int) -> str | None:
        """``name`` or ``name+0x1c`` for what lies at a virtual address; None when no symbol covers it.

        A symbol of unknown size reaches to the next one, within its segment.
        """
        place = bisect_right(self._addresses, address) - 1
        if place < 0:
            return None
        symbol = self.symbols[place]
        offset = address - symbol.address
        if symbol.size and offset >= symbol.size:
            return None
        if not any(s.vaddr <= symbol.address and address < s.vaddr + s.memsz for s in self.segments):
            return None
        return f"{symbol.name}+{offset:#x}" if offset else symbol.name

    def address_of(self, name: str) -> int:
        """The virtual address of the symbol ``name``. Raises KeyError."""
        for symbol in self.symbols:
            if symbol.name == name:
                return symbol.address
        raise KeyError(name)
