"""Segments of a machine's memory, served on sockets while its guest runs.

Requests are worked off at safe points only: between two slices of the guest, and at the host's ticks, when no vCPU is
inside the guest and nobody holds a lock. As long as nobody is attached that changes nothing of a run. What an operation
of the host recalls meanwhile it waits for where it stands; requests that come in between are kept for the next safe
point.

A node in another process cannot see the host's frames: its loads and stores are messages that name the frame which it
was granted, and are refused when that is not pinned for it any more. So a node that is cut off is cut off at once,
whatever it has kept, and one that lies about a recall finds out that its translation is worth nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xipvm.address import format_size, parse_size
from xipvm.errors import BadInput, ProtocolUnsupported
from xipvm.mmu.secondary.xpmem import RemoteNode, Xpmem
from xipvm.xpmem.sockets import SocketLink, listen, peer_name
from xipvm.xpmem.wire import FROM_NODE, TEXT_LIMIT

if TYPE_CHECKING:
    from xipvm.machine import Machine

TIMEOUT: Final = 1.0
"""Seconds in which a node has to answer a recall."""
NODE_LIMIT: Final = 64
"""Nodes of one socket; more are turned away."""
_LINGER: Final = 0.002
"""Seconds without a request after which the guest goes on: who asks mostly asks again."""
_SPELL: Final = 0.050
"""Seconds that the guest stands still at most."""


@dataclass(frozen=True)
class ExportOption:
    """What ``--export`` says: ``size`` bytes of RAM from guest-physical ``base`` on, called ``name``.

    ``path`` is the socket; ``timeout`` seconds are what a node has to answer a recall.
    """

    name: str
    base: int
    size: int
    path: str
    writable: bool = True
    timeout: float = TIMEOUT


def parse_export(text: str) -> ExportOption:
    """``NAME=BASE,SIZE[,path=SOCKET][,readonly=on][,timeout=SECONDS]``. Raises BadInput."""

    def bad(why: str) -> BadInput:
        return BadInput(f"--export {text}: {why}")

    name, equals, rest = text.partition("=")
    if not equals or not name or not name.isprintable() or name != "".join(name.split()) or "/" in name:
        raise bad("write NAME=BASE,SIZE, as in ram=0x40000000,64K")
    base, *options = rest.split(",")
    if not options:
        raise bad("it needs a size, as in ram=0x40000000,64K")
    if len(name.encode()) > TEXT_LIMIT:
        raise bad(f"a name has {TEXT_LIMIT} bytes at most")
    try:
        where, size = parse_size(base), parse_size(options[0])
    except ValueError as error:
        raise bad(str(error)) from None
    path, writable, timeout = f"{name}.sock", True, TIMEOUT
    for option in options[1:]:
        key, _, value = option.partition("=")
        if key == "path" and value:
            path = value
        elif key == "readonly" and value in ("on", "off"):
            writable = value == "off"
        elif key == "timeout":
            try:
                timeout = float(value)
            except ValueError:
                timeout = 0.0
            if not 0 < timeout <= 3600:
                raise bad(f"{value!r} is no number of seconds up to an hour")
        else:
            raise bad(f"{option!r} is none of path=SOCKET, readonly=on|off, timeout=SECONDS")
    return ExportOption(name, where, size, path, writable, timeout)


class Export:
    """One segment of ``machine``, on a socket of its own, until ``close`` or the machine's end. Raises BadInput.

    ``log`` gets a line for a person when a node was cut off; ``clock`` is what a node's time is measured by.
    """

    def __init__(
        self,
        machine: Machine,
        option: ExportOption,
        *,
        name: str = "xpmem0",
        log: Callable[[str], object] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        first, end = machine.board.ram_base, machine.board.ram_base + machine.memory_size
        if not option.size or option.base < first or option.base + option.size > end:
            raise BadInput(f"--export {option.name}: RAM is {first:#x} to {end:#x}; nothing else can be exported")
        self.option = option
        self._machine = machine
        self._trace = machine.trace
        self._log = log
        self._clock = clock
        self._closed = False
        self.owner = Xpmem(machine.mm, name=name)
        self.owner.on_fence = self._fenced
        try:
            self.owner.register()
        except ProtocolUnsupported:
            raise BadInput(
                f"--export {option.name}: a recall waits for a node, and no callback of the 2008 protocol may wait"
            ) from None
        try:
            self._listener = listen(option.path)
        except BadInput:
            self.owner.destroy()
            raise
        self._inode = os.stat(option.path).st_ino
        hva = machine.ram + option.base - first
        self.owner.make(option.name, hva, option.size, writable=option.writable)
        machine.add_service(self.poll, self.close)

    def __str__(self) -> str:
        option = self.option
        return f"{option.name} ({format_size(option.size)} at {option.base:#x}) is exported on {option.path}"

    def poll(self) -> None:
        """Accept who wants in, and answer what was asked. The guest is not running."""
        if self._closed or not self._ready(0.0):
            return
        actor, self._trace.actor = self._trace.actor, self.owner.name
        try:
            until = time.monotonic() + _SPELL
            while time.monotonic() < until and self._ready(_LINGER):
                self._accept()
                for node in list(self.owner.nodes):
                    self.owner.serve(node)
        finally:
            self._trace.actor = actor

    def _ready(self, seconds: float) -> bool:
        """Something has come, or comes within ``seconds``."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        for node in self.owner.nodes:
            if node.requests:
                return True
            if isinstance(node.link, SocketLink) and node.link.fileno() >= 0:
                poller.register(node.link.fileno(), node.link.awaited)
        return bool(poller.poll(seconds * 1000))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if len(self.owner.nodes) >= NODE_LIMIT:
                connection.close()
                continue
            self._connect(connection)

    def _connect(self, connection: socket.socket) -> None:
        link = SocketLink(connection, peer_name(connection), FROM_NODE, timeout=self.option.timeout, clock=self._clock)
        self.owner.connect(link)

    def _fenced(self, node: RemoteNode) -> None:
        self._log(f"{self.option.name}: {node.name} was cut off: {node.fenced}")

    def close(self) -> None:
        """Take everything back, let every node go, and remove the socket. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._machine.remove_service(self.poll)
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.stat(self.option.path).st_ino == self._inode:
                os.unlink(self.option.path)
        self.owner.destroy()
