"""Links between processes: AF_UNIX stream sockets.

Nothing here waits but :meth:`SocketLink.wait`. What cannot be sent at once is kept, up to a limit behind which the
other end counts as gone: who does not read what it asked for gets no more. What comes in is bytes of a stranger's, and
goes through the decoder. Time is the host's, and only here: how long an answer may take.
"""

from __future__ import annotations

import math
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from xipvm.errors import BadInput, os_reason
from xipvm.locks.check import might_sleep
from xipvm.xpmem.link import LinkClosedError
from xipvm.xpmem.wire import Decoder, Kind, Message, encode

UNREAD_LIMIT: Final = 1 << 20
"""Bytes that are kept for an end that does not read them."""
_CHUNK: Final = 64 << 10
_CREDENTIALS: Final = struct.Struct("3i")


class SocketLink:
    """One end of a connected socket, which it closes. ``kinds``: what may come in.

    ``timeout``: seconds that an answer may take, None for ever; ``clock`` is what they are measured by.
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        kinds: frozenset[Kind],
        *,
        timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._socket = connection
        self._socket.setblocking(False)
        self._timeout = math.inf if timeout is None else timeout
        self._clock = clock
        self._decoder = Decoder(kinds)
        self._arrived: deque[Message] = deque()
        self._unsent = bytearray()
        self._over = False

    @property
    def closed(self) -> bool:
        """See :class:`~xipvm.xpmem.link.Link`."""
        return self._over

    def fileno(self) -> int:
        """The socket's descriptor, -1 when it is closed."""
        return self._socket.fileno()

    @property
    def awaited(self) -> int:
        """What of its descriptor is waited for, as select.poll has it."""
        return select.POLLIN | (select.POLLOUT if self._unsent else 0)

    def send(self, message: Message) -> None:
        """See :class:`~xipvm.xpmem.link.Link`."""
        if self._over:
            raise LinkClosedError("it has gone without a word")
        self._unsent += encode(message)
        self._flush()
        if len(self._unsent) > UNREAD_LIMIT:
            self._over = True
            raise LinkClosedError("it does not read what it is sent")

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:  # the other end is not there; what it had sent before may still be read
            self._unsent.clear()

    def receive(self) -> Message | None:
        """See :class:`~xipvm.xpmem.link.Link`."""
        if not self._arrived:
            self._fill()
        if self._arrived:
            return self._arrived.popleft()
        if self._decoder.broken is not None and self._socket.fileno() >= 0:
            raise self._decoder.broken
        return None

    def _fill(self) -> None:
        if self._over or self._decoder.broken is not None:
            return
        if self._unsent:
            self._flush()
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._arrived += self._decoder.take(data)
        else:
            self._over = True

    def patience(self) -> float:
        """The time by the clock at which it ends."""
        return self._clock() + self._timeout

    def wait(self, what: str, ready: Callable[[], bool], patience: float) -> bool:
        """See :class:`~xipvm.xpmem.link.Link`."""
        might_sleep(what)
        while True:
            self._fill()
            if ready() or self._arrived or self._over or self._decoder.broken is not None:
                return True
            left = patience - self._clock()
            if left <= 0:
                return False
            poller = select.poll()
            poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            poller.poll(None if left == math.inf else left * 1000)

    def close(self) -> None:
        """See :class:`~xipvm.xpmem.link.Link`. What the other end can still take is sent first."""
        if self._socket.fileno() >= 0:
            self._flush()
            self._socket.close()
        self._over = True


def peer_name(connection: socket.socket) -> str:
    """Who is at the other end, as the kernel says: ``pid 1234``."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return f"pid {_CREDENTIALS.unpack(raw)[0]}"


def connect(path: str) -> socket.socket:
    """A connection to whoever listens on ``path``. Raises BadInput."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise BadInput(f"{path}: {_why(path, error)}") from None
    return connection


def _why(path: str, error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there any more" if _is_socket(path) else "this is no socket"
    return os_reason(error)


def listen(path: str) -> socket.socket:
    """A socket that listens on ``path``, for this user only; replaces one that nobody listens on. Raises BadInput."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_socket(path) and not _listened_to(path):
            os.unlink(path)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen()
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise BadInput(f"{path}: {os_reason(error)}") from None
    return listener


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _listened_to(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
