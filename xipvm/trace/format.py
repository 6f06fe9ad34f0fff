"""The trace file, version 1.

A file is a sequence of *segments*, one for each recording; appending adds a segment, and files may be
concatenated. All numbers are little-endian. A segment begins with ::

    magic    8 bytes   b"XIPVMTRC"
    version  u16       1
    length   u32       of the header that follows
    header   JSON      {"kinds": {name: spec, ...}, "machine": {...}}

``kinds`` is the schema that the segment was written with (spelled as in :mod:`xipvm.trace.events`); a
kind's number is its place in it. ``machine`` is whatever the recorder was told about the machine.
Records follow, each ::

    length   u32       of the whole record, never 0
    kind     u16       number of the kind, or STRING, or END
    body
    mark     u8        0xA5, written last: a record without it was being written when the writer died

Body of an event: actor u32 (a string), seq u64, time u64, cause u64, the fields that are no runs, then for
each field of runs the number of runs u32, then the runs themselves, u64 pairs. A number is u64, ``int`` i64,
``bool`` u8; an optional number has a u8 before it that says whether it is there. Strings are u32 numbers;
0 is None, the others were defined by an earlier STRING record: number u32, UTF-8 text (surrogates as they
come). A number may be defined again: the later definition counts.

END closes a segment; its body is the number of events, u64. The writer extends the file ahead of what it
writes, so the file of a killed writer ends in zeros: a record of length 0 ends such a segment.
"""

from __future__ import annotations

import struct

from xipvm.trace.events import RUN_TYPES, Kind

MAGIC = b"XIPVMTRC"
VERSION = 1
PREAMBLE = struct.Struct("<8sHI")  # magic, version, length of the header

STRING = 0xFFFF
END = 0xFFFE
MAX_KINDS = 0xFF00
MARK = 0xA5

HEAD = struct.Struct("<IH")  # length, kind
EVENT_HEAD = "IHIQQQ"  # length, kind, actor, seq, time, cause
STRING_HEAD = struct.Struct("<IHI")  # length, kind, number
END_RECORD = struct.Struct("<IHQB")  # length, kind, events, mark

MAX_RECORD = 1 << 28
"""No record is longer. The magic, read as a length, is."""

MAX_STRINGS = 1 << 16
"""How many strings are known at a time; a writer that needs more forgets all and defines anew."""

TEXT_ERRORS = "surrogatepass"

_CODES = {"str": "I", "bool": "B", "int": "q"}


def fixed_part(kind: Kind) -> str:
    """The struct codes (without byte order) of an event of ``kind`` up to its runs, or up to the mark."""
    codes = [EVENT_HEAD]
    for _, type_, optional in kind.fields:
        if type_ not in RUN_TYPES:
            codes.append(("B" if optional else "") + _CODES.get(type_, "Q"))
    codes.extend("I" for field in kind.fields if field.type in RUN_TYPES)
    return "".join(codes)
