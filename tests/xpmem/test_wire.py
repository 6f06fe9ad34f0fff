"""The frames of XPMEM: there and back, in any pieces; and whatever else may come."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.address import PAGE_SIZE
from xipvm.xpmem.wire import (
    _LAYOUTS,
    FROM_NODE,
    FROM_OWNER,
    VERSION,
    Decoder,
    Kind,
    Message,
    VersionError,
    WireError,
    encode,
    text_data,
)

ALL = FROM_NODE | FROM_OWNER
NUMBERS = st.integers(0, (1 << 64) - 1)
LONGEST = 12 + 64 * 256


@st.composite
def messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(Kind))
    layout = _LAYOUTS[kind]
    numbers = tuple(draw(NUMBERS) for _ in range(layout.numbers))
    return Message(kind, draw(st.integers(0, (1 << 32) - 1)), numbers, draw(st.binary(max_size=min(layout.data, 300))))


def decoded(data: bytes, cuts: list[int], kinds: frozenset[Kind] = ALL) -> tuple[list[Message], Decoder]:
    decoder = Decoder(kinds)
    found: list[Message] = []
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(places):
        found += decoder.take(data[start:end])
    return found, decoder


@settings(deadline=None)
@given(st.lists(messages(), max_size=6), st.lists(st.integers(0, 4000)))
def test_what_is_sent_comes_whole_and_in_order(sent: list[Message], cuts: list[int]) -> None:
    found, decoder = decoded(b"".join(map(encode, sent)), cuts)
    assert found == sent
    assert decoder.broken is None
    assert decoder.pending == 0


@settings(deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 400)))
def test_garbage_breaks_it_wherever_it_is_cut(garbage: bytes, cuts: list[int]) -> None:
    whole, at_once = decoded(garbage, [])
    pieces, in_pieces = decoded(garbage, cuts)
    assert pieces == whole
    assert str(in_pieces.broken) == str(at_once.broken)
    assert at_once.pending <= len(garbage)
    if garbage and garbage[:1] != b"X":
        assert whole == []
        assert at_once.broken is not None


@settings(deadline=None)
@given(messages(), st.integers(0, 11), st.integers(0, 255))
def test_a_header_with_a_wrong_byte_gives_no_other_message_than_it_says(
    message: Message, place: int, value: int
) -> None:
    frame = bytearray(encode(message))
    frame[place] = value
    found, decoder = decoded(bytes(frame), [])
    for seen in found:
        assert seen.data == b"" or len(seen.data) <= _LAYOUTS[seen.kind].data
        assert len(seen.numbers) == _LAYOUTS[seen.kind].numbers
    assert decoder.pending <= LONGEST


@settings(deadline=None)
@given(messages())
def test_after_what_is_wrong_nothing_is_believed(message: Message) -> None:
    decoder = Decoder(ALL)
    assert decoder.take(encode(message) + b"??") == [message]
    assert isinstance(decoder.broken, WireError)
    assert decoder.take(encode(message)) == []


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (b"GET /", "no message of XPMEM"),
        (b"XP\x02", f"version 2 of the protocol, this is version {VERSION}"),
        (b"XP\x01\xff" + bytes(8), "message kind 255"),
        (b"XP\x01\x13" + bytes(8), "GRANT, which is not its to say"),
        (b"XP\x01\x04" + bytes(8), "FAULT of 0 bytes"),
        (b"XP\x01\x04" + bytes(4) + b"\xff\xff\xff\xff", "FAULT of 4294967295 bytes"),
        (b"XP\x01\x06" + bytes(4) + (33 + PAGE_SIZE).to_bytes(4, "big"), "STORE of 4129 bytes"),
    ],
)
def test_what_is_refused_from_a_node(frame: bytes, complaint: str) -> None:
    found, decoder = decoded(frame, [], FROM_NODE)
    assert found == []
    assert complaint in str(decoder.broken)
    assert isinstance(decoder.broken, VersionError) == ("version" in complaint)


def test_what_cannot_be_sent() -> None:
    for bad in (
        Message(Kind.FAULT, 0, (1, 2)),
        Message(Kind.DONE, 0, (), b"x"),
        Message(Kind.RELEASE, 0, (-1,)),
        Message(Kind.RELEASE, 1 << 32, (1,)),
        Message(Kind.DATA, 0, (), bytes(PAGE_SIZE + 1)),
    ):
        with pytest.raises(WireError):
            encode(bad)


def test_text_is_one_line_whatever_it_is() -> None:
    assert Message(Kind.GONE, 0, (), b"a\n\x1b[31mb\xff").text == "a [31mb\N{REPLACEMENT CHARACTER}"
    assert len(text_data("\N{GREEK SMALL LETTER ALPHA}" * 200)) == 256
