"""The guest's console: bytes out to a stream, bytes in from a script, a pipe or a terminal.

Output is collected and handed to the stream a line at a time, when the guest polls for live input, and
whenever the guest is left (``poll``), so that a guest that prints byte by byte costs no system call each.

Input is taken from a source only as the guest asks for it. A script (bytes, a file) is simply there; live
sources (a pipe, a terminal) are looked at in ``poll`` and on every ``_LIVE_POLLS``-th vain question of the
guest. Ordering: a device registers with ``listen`` and is called every time that input appears where there
was none; it then drives its interrupt line from ``readable``.

Programs that print much look for a Ctrl-C between their lines, and throw away whatever else they find. So
that this does not eat the next lines of a script, ``offered``, which is what a polling guest sees, holds
input back after each line until the guest has asked ``_QUIET_POLLS`` times without printing; a Ctrl-C is
there at once.

``until`` ends a scripted session: its text counts only in what the guest prints after it took the last
byte of input, so a prompt that the script's own answers follow does not end the run.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import IO, Protocol

_BUFFER = 4096
_TAIL = 1 << 16
_LIVE_POLLS = 64
_AHEAD = 1 << 16  # input that is taken before the guest wants it, bytes
_QUIET_POLLS = 16
_CTRL_C = 0x03
_CTRL_A = 0x01
_HELP = b"\r\nCtrl-A x  leave xipvm\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\nCtrl-A h  this help\r\n"


class InputSource(Protocol):
    """Where console input comes from."""

    live: bool
    """Whether bytes may appear by themselves (a pipe, a terminal); a script has them all at once."""

    def take(self) -> bytes:
        """What has arrived since the last call, without waiting; ``b""`` when nothing has."""

    def ended(self) -> bool:
        """Whether nothing will ever come again."""

    def fileno(self) -> int | None:
        """A descriptor to wait on, None when there is nothing to wait for."""

    def close(self) -> None:
        """Give back what the source holds; calling it again does nothing."""


class ScriptInput:
    """Input that is known beforehand."""

    live = False

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self) -> bytes:
        """Everything, the first time."""
        data, self._data = self._data, b""
        return data

    def ended(self) -> bool:
        """Whether it has been taken."""
        return not self._data

    def fileno(self) -> int | None:
        """Nothing to wait for."""
        return None

    def close(self) -> None:
        """Nothing is held."""


class StreamInput:
    """Input from a descriptor that is no terminal: a pipe, a socket, a redirected file."""

    live = True

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ended = False

    def take(self) -> bytes:
        """What can be read now; at the end of the file the source has ended."""
        if self._ended or not _readable(self._fd, 0):
            return b""
        data = os.read(self._fd, _BUFFER)
        self._ended = not data
        return data

    def ended(self) -> bool:
        """Whether the end of the file was read."""
        return self._ended

    def fileno(self) -> int | None:
        """The descriptor, None after its end."""
        return None if self._ended else self._fd

    def close(self) -> None:
        """The descriptor belongs to the caller."""


class TerminalInput(StreamInput):
    """Keys from a terminal in raw mode; Ctrl-A is the escape key, as in QEMU.

    Ctrl-A x calls ``on_quit``, Ctrl-A h shows the keys, Ctrl-A Ctrl-A is a Ctrl-A for the guest; Ctrl-C and
    all others go to the guest. ``close`` puts the terminal back; so do the interpreter's exit, SIGTERM and
    SIGHUP.
    """

    def __init__(self, fd: int, on_quit: Callable[[], None]) -> None:
        super().__init__(fd)
        self._on_quit = on_quit
        self._escaped = False
        self._saved: list[object] | None = termios.tcgetattr(fd)
        raw = termios.tcgetattr(fd)
        raw[0] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        # Output keeps its processing: a guest's and our own bare newlines still return the carriage.
        raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
        raw[6][termios.VMIN] = 1
        raw[6][termios.VTIME] = 0
        termios.tcsetattr(fd, termios.TCSANOW, raw)
        atexit.register(self.close)
        self._handlers: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def take(self) -> bytes:
        """What was typed, without the escape sequences, which are obeyed here."""
        keys = bytearray()
        for key in super().take():
            if not self._escaped:
                self._escaped = key == _CTRL_A
                if not self._escaped:
                    keys.append(key)
                continue
            self._escaped = False
            if key == _CTRL_A:
                keys.append(key)
            elif key in b"xX":
                self._on_quit()
            elif key in b"hH?":
                sys.stderr.buffer.write(_HELP)
                sys.stderr.buffer.flush()
        return bytes(keys)

    def close(self) -> None:
        """Put the terminal and the signal handlers back."""
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
        for number, handler in self._handlers.items():
            # None: whatever was there was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        atexit.unregister(self.close)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.close()
        # The handlers are the old ones again; the signal gets what it would have had without us.
        os.kill(os.getpid(), number)


class Console:
    """The guest's console. A context manager: leaving it flushes and restores the terminal.

    ``tail`` is the end of what was printed since the guest took its last byte of input.
    """

    def __init__(
        self,
        output: IO[bytes] | None = None,
        source: InputSource | bytes | None = None,
        *,
        until: bytes | str | None = None,
        on_until: Callable[[], None] | None = None,
    ) -> None:
        self._output = output
        self._source: InputSource = (
            source if source is not None and not isinstance(source, bytes) else ScriptInput(source or b"")
        )
        self._until = until.encode() if isinstance(until, str) else until or b""
        self._on_until = on_until
        self.tail = bytearray()
        self.quit_requested = False
        self.on_quit: Callable[[], None] | None = None
        self._pending = bytearray()
        self._input = bytearray(b"" if self._source.live else self._source.take())
        self._next = 0
        self._vain = 0
        self._held = False
        self._quiet = 0
        self._listeners: list[Callable[[], None]] = []

    @classmethod
    def stdio(cls, *, until: bytes | str | None = None, on_until: Callable[[], None] | None = None) -> Console:
        """A console on standard output and input; a terminal is put in raw mode until ``close``."""
        console = cls(sys.stdout.buffer, until=until, on_until=on_until)
        fd = sys.stdin.fileno()
        console._source = TerminalInput(fd, console.quit) if os.isatty(fd) else StreamInput(fd)
        return console

    # -- guest side

    def write(self, byte: int) -> None:
        """The guest prints one byte."""
        pending = self._pending
        pending.append(byte)
        self.tail.append(byte)
        self._quiet = 0
        if byte == 0x0A or len(pending) >= _BUFFER:
            self.flush()
        if self._until and byte == self._until[-1] and self.tail.endswith(self._until) and self.input_used():
            self._reached()

    def readable(self) -> bool:
        """Whether ``read`` has a byte."""
        if self._next < len(self._input):
            return True
        if not self.live:
            return False
        self._vain += 1
        if self._vain % _LIVE_POLLS == 1:
            # It is waiting for somebody: that one should see the prompt.
            self.flush()
            return self._fill()
        return False

    def offered(self) -> bool:
        """``readable`` for a guest that polls: it wants another line once it asks again and prints nothing."""
        if not self.readable():
            return False
        if not self._held or self._input[self._next] == _CTRL_C:
            return True
        self._quiet += 1
        self._held = self._quiet < _QUIET_POLLS
        return not self._held

    def read(self) -> int | None:
        """The next byte of input, None when there is none now."""
        if not self.readable():
            return None
        byte = self._input[self._next]
        self._next += 1
        self._held = byte in b"\r\n"
        self._quiet = 0
        if self._next == len(self._input):
            self._input.clear()
            self._next = 0
            self._vain = 0
        self.tail.clear()
        return byte

    def listen(self, changed: Callable[[], None]) -> None:
        """Call ``changed()`` whenever input arrives where there was none."""
        self._listeners.append(changed)

    def unlisten(self, changed: Callable[[], None]) -> None:
        """Undo ``listen``."""
        self._listeners.remove(changed)

    # -- host side

    def poll(self) -> bool:
        """To be called whenever the guest is left: flush, take live input, tell listeners. Returns ``readable``."""
        self.flush()
        if self.live and len(self._input) - self._next < _AHEAD:
            self._fill()  # also when there is input that the guest does not take: Ctrl-A x may come
        return self._next < len(self._input)

    def wait(self, seconds: float | None) -> bool:
        """Sleep until input arrives or ``seconds`` have passed (None: no limit); False when it cannot arrive.

        For an idle guest on the host's clock. Follow it with ``poll``.
        """
        self.flush()
        fd = self._source.fileno()
        if fd is None:
            return False
        _readable(fd, seconds)
        return True

    def watch(self, until: bytes | str, on_until: Callable[[], None]) -> None:
        """Call ``on_until()`` once when all input is used and the guest then prints ``until``."""
        self._until = until.encode() if isinstance(until, str) else until
        self._on_until = on_until

    def unwatch(self) -> None:
        """Undo ``watch``."""
        self._until = b""
        self._on_until = None

    @property
    def live(self) -> bool:
        """Whether input may still arrive from outside."""
        return self._source.live and not self._source.ended()

    def input_used(self) -> bool:
        """Whether the guest has taken every byte of input that there will ever be."""
        return self._next >= len(self._input) and self._source.ended()

    def quit(self) -> None:
        """The user asks to leave (Ctrl-A x): sets ``quit_requested`` and calls ``on_quit``."""
        self.quit_requested = True
        if self.on_quit is not None:
            self.on_quit()

    def flush(self) -> None:
        """Hand the collected output to the stream."""
        if not self._pending:
            return
        if self._output is not None:
            self._output.write(bytes(self._pending))
            self._output.flush()
        self._pending.clear()
        if len(self.tail) > _TAIL:
            del self.tail[: -_TAIL // 2]

    def close(self) -> None:
        """Flush and give the input source back (a terminal leaves raw mode). May be called again."""
        try:
            self.flush()
        finally:
            self._source.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _reached(self) -> None:
        self.flush()
        self._until = b""
        if self._on_until is not None:
            self._on_until()

    def _fill(self) -> bool:
        data = self._source.take()
        if not data:
            # The end of a pipe shows only after its last byte, when the text may have been printed already.
            if self._until and self.input_used() and self._until in self.tail:
                self._reached()
            return False
        self._input += data
        self._vain = 0
        for changed in self._listeners:
            changed()
        return True


def _readable(fd: int, seconds: float | None) -> bool:
    """Whether ``fd`` can be read, or has ended, within so many seconds (None: no limit). Any descriptor will do."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))
