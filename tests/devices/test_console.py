"""The console: buffering, input sources, `until`, and the terminal's escape key."""

from __future__ import annotations

import io
import os
import pty
import signal
import termios
from collections.abc import Iterator

import pytest

from xipvm.console import Console, ScriptInput, StreamInput, TerminalInput


class CountingStream(io.BytesIO):
    """Counts the writes that reach it."""

    writes = 0

    def write(self, data: object) -> int:
        self.writes += 1
        return super().write(data)  # type: ignore[arg-type]


def say(console: Console, text: bytes) -> None:
    for byte in text:
        console.write(byte)


def take_all(console: Console) -> bytes:
    got = bytearray()
    while (byte := console.read()) is not None:
        got.append(byte)
    return bytes(got)


class TestOutput:
    def test_one_write_a_line(self) -> None:
        stream = CountingStream()
        console = Console(stream)
        say(console, b"one\ntwo\nthree")
        assert (stream.writes, stream.getvalue()) == (2, b"one\ntwo\n")
        console.poll()
        assert stream.getvalue() == b"one\ntwo\nthree"
        console.poll()
        assert stream.writes == 3

    def test_a_line_without_end_is_handed_on_in_blocks(self) -> None:
        stream = CountingStream()
        say(Console(stream), b"x" * 10_000)
        assert stream.writes == 2

    def test_leaving_the_context_flushes(self) -> None:
        stream = CountingStream()
        with Console(stream) as console:
            say(console, b"prompt> ")
        assert stream.getvalue() == b"prompt> "

    def test_the_tail_is_bounded(self) -> None:
        console = Console()
        say(console, b"line\n" * 60_000)
        assert len(console.tail) <= 1 << 16
        assert console.tail.endswith(b"line\n")


class TestScript:
    def test_is_read_to_its_end_and_no_further(self) -> None:
        console = Console(source=b"ab")
        assert console.readable()
        assert not console.input_used()
        assert take_all(console) == b"ab"
        assert not console.readable()
        assert console.input_used()
        assert console.wait(0) is False

    def test_until_counts_only_after_the_last_byte_of_input(self) -> None:
        hits: list[bytes] = []
        console = Console(source=b"go\n", until="=> ", on_until=lambda: hits.append(bytes(console.tail)))
        say(console, b"=> ")
        take_all(console)
        assert hits == []
        say(console, b"done\n=> ")
        assert hits == [b"done\n=> "]
        say(console, b"=> ")
        assert len(hits) == 1

    def test_until_does_not_join_text_from_before_the_last_input(self) -> None:
        hits: list[int] = []
        console = Console(source=b"x", until=b"=> ", on_until=lambda: hits.append(1))
        say(console, b"=>")
        take_all(console)
        say(console, b" ")
        assert hits == []

    def test_until_without_input(self) -> None:
        hits: list[int] = []
        stream = io.BytesIO()
        console = Console(stream, until="login:", on_until=lambda: hits.append(1))
        say(console, b"\nlogin:")
        assert hits == [1]
        assert stream.getvalue() == b"\nlogin:"


class TestPipe:
    @pytest.fixture
    def pipe(self) -> Iterator[tuple[int, int]]:
        ends = os.pipe()
        yield ends
        for fd in ends:
            try:
                os.close(fd)
            except OSError:
                continue

    def test_bytes_arrive_in_poll_and_are_told_once(self, pipe: tuple[int, int]) -> None:
        console = Console(source=StreamInput(pipe[0]))
        told: list[bool] = []
        changed = lambda: told.append(console.readable())  # noqa: E731
        console.listen(changed)
        assert not console.poll()
        os.write(pipe[1], b"ab")
        assert console.wait(0)
        assert console.poll()
        assert console.poll()
        assert told == [True]
        assert take_all(console) == b"ab"
        console.unlisten(changed)
        os.write(pipe[1], b"c")
        assert console.poll()
        assert told == [True]

    def test_a_guest_that_only_polls_gets_its_input_and_shows_its_prompt(self, pipe: tuple[int, int]) -> None:
        stream = io.BytesIO()
        console = Console(stream, StreamInput(pipe[0]))
        say(console, b"> ")
        assert not console.readable()
        assert stream.getvalue() == b"> "
        os.write(pipe[1], b"z")
        assert any(console.readable() for _ in range(100))
        assert console.read() == ord("z")

    def test_the_end_of_the_pipe_is_the_end_of_input(self, pipe: tuple[int, int]) -> None:
        console = Console(source=StreamInput(pipe[0]))
        os.write(pipe[1], b"q")
        os.close(pipe[1])
        console.poll()
        assert not console.input_used()
        assert take_all(console) == b"q"
        console.poll()
        assert console.input_used()
        assert console.wait(None) is False

    def test_until_holds_when_the_end_shows_after_the_text(self, pipe: tuple[int, int]) -> None:
        hits: list[int] = []
        console = Console(source=StreamInput(pipe[0]))
        console.watch("=> ", lambda: hits.append(1))
        os.write(pipe[1], b"q")
        os.close(pipe[1])
        console.poll()
        assert console.read() == ord("q")
        assert console.live
        say(console, b"bye\n=> ")
        assert hits == []
        console.poll()
        console.poll()
        assert hits == [1]
        assert not console.live

    def test_until_does_not_hold_for_text_from_before_the_last_byte(self, pipe: tuple[int, int]) -> None:
        hits: list[int] = []
        console = Console(source=StreamInput(pipe[0]))
        console.watch(b"=> ", lambda: hits.append(1))
        say(console, b"=> ")
        os.write(pipe[1], b"q")
        os.close(pipe[1])
        console.poll()
        take_all(console)
        console.poll()
        assert console.input_used()
        assert hits == []


class TestTerminal:
    @pytest.fixture
    def terminal(self) -> Iterator[tuple[int, int]]:
        ends = pty.openpty()
        yield ends
        for fd in ends:
            os.close(fd)

    def test_raw_mode_while_open_and_restored_after(self, terminal: tuple[int, int]) -> None:
        keyboard, fd = terminal
        before = termios.tcgetattr(fd)
        handler = signal.getsignal(signal.SIGTERM)
        source = TerminalInput(fd, lambda: None)
        assert not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        os.write(keyboard, b"a\x03\r")
        assert source.take() == b"a\x03\r"
        source.close()
        source.close()
        assert termios.tcgetattr(fd) == before
        assert signal.getsignal(signal.SIGTERM) is handler

    def test_escape_key(self, terminal: tuple[int, int], capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        keyboard, fd = terminal
        quits: list[int] = []
        source = TerminalInput(fd, lambda: quits.append(1))
        try:
            os.write(keyboard, b"a\x01\x01b\x01zc\x01")
            assert source.take() == b"a\x01bc"
            os.write(keyboard, b"xd\x01h")
            assert source.take() == b"d"
            assert quits == [1]
            assert b"Ctrl-A x" in capfdbinary.readouterr().err
        finally:
            source.close()

    def test_sigterm_restores_the_terminal_and_is_passed_on(self, terminal: tuple[int, int]) -> None:
        fd = terminal[1]
        before = termios.tcgetattr(fd)
        passed: list[int] = []
        old = signal.signal(signal.SIGTERM, lambda number, frame: passed.append(number))
        try:
            TerminalInput(fd, lambda: None)
            os.kill(os.getpid(), signal.SIGTERM)
            assert termios.tcgetattr(fd) == before
            assert passed == [signal.SIGTERM]
        finally:
            signal.signal(signal.SIGTERM, old)


def test_quit_is_remembered_and_told() -> None:
    console = Console()
    console.quit()
    assert console.quit_requested
    told: list[int] = []
    console.on_quit = lambda: told.append(1)
    console.quit()
    assert told == [1]


def test_input_that_the_guest_leaves_does_not_hide_what_comes_after() -> None:
    """Ctrl-A x has to be seen behind keys that nobody reads."""

    class Keys(ScriptInput):
        live = True

        def take(self) -> bytes:
            taken, self._data = self._data[:1], self._data[1:]
            return taken

    console = Console(None, Keys(b"abc"))
    for _ in range(3):
        assert console.poll()
    assert [console.read() for _ in range(4)] == [*b"abc", None]
