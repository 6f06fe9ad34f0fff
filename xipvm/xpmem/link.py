"""What carries messages, one end of it; and the link between an owner and a node in one program.

A link keeps the order of what is sent through it: a GRANT never comes behind the RECALL that takes it back. Neither end
waits in ``send``; :meth:`Link.wait` is where an end sleeps, and where patience ends.

:class:`ActorLink` connects actors. Under a scheduler whoever waits sleeps, so that latency is a matter of who goes on:
every order that a network could bring about is a schedule. There is no time: patience ends when somebody says so
(:meth:`ActorLink.lose_patience`). Without a scheduler the other end does its part while this one waits, on the same
stack; when that does not help, nothing will, and patience has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from xipvm.actors import can_wait
from xipvm.errors import XipvmError
from xipvm.locks.check import might_sleep, sleep_until
from xipvm.xpmem.wire import Message


class LinkClosedError(XipvmError):
    """Nothing can be sent: this end or the other one has gone."""


class Link(Protocol):
    """One end. ``name`` is what the other one is called."""

    name: str

    @property
    def closed(self) -> bool:
        """Nothing more comes, and nothing can be sent. What had arrived before may still be received."""

    def send(self, message: Message) -> None:
        """Let the other end have ``message``. Never sleeps. Raises LinkClosedError."""

    def receive(self) -> Message | None:
        """What has arrived next, None for nothing. Raises WireError for what is no message."""

    def patience(self) -> float:
        """A measure of how long to :meth:`wait`, from now on."""

    def wait(self, what: str, ready: Callable[[], bool], patience: float) -> bool:
        """Sleep until ``ready()``, or something has arrived, or it is closed; False when ``patience`` has ended.

        ``ready`` changes nothing. Raises AtomicSleepError where nobody may sleep.
        """

    def close(self) -> None:
        """Nothing is sent or received any more. A second call does nothing."""


class ActorLink:
    """One end of a link between actors; :meth:`pair` makes both."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.serve: Callable[[], object] | None = None
        """Does what this end has to do about what has arrived; for when nobody schedules."""
        self._inbox: deque[Message] = deque()
        self._peer: ActorLink = self
        self._closed = False
        self._impatient = False

    @classmethod
    def pair(cls, owner: str, node: str) -> tuple[ActorLink, ActorLink]:
        """The owner's end, whose other one is called ``node``, and the node's."""
        ends = cls(node), cls(owner)
        ends[0]._peer, ends[1]._peer = ends[1], ends[0]
        return ends

    @property
    def closed(self) -> bool:
        """See :class:`Link`."""
        return self._closed

    @property
    def arrived(self) -> bool:
        """There is something to receive."""
        return bool(self._inbox)

    def send(self, message: Message) -> None:
        """See :class:`Link`."""
        if self._closed:
            raise LinkClosedError("it has gone without a word")
        self._peer._inbox.append(message)

    def receive(self) -> Message | None:
        """See :class:`Link`."""
        return self._inbox.popleft() if self._inbox else None

    def patience(self) -> float:
        """There is no time."""
        return 0.0

    def lose_patience(self) -> None:
        """Whoever waits at this end waits no longer."""
        self._impatient = True

    def wait(self, what: str, ready: Callable[[], bool], patience: float) -> bool:
        """See :class:`Link`."""

        def over() -> bool:
            return ready() or bool(self._inbox) or self._closed

        if can_wait():
            sleep_until(what, lambda: over() or self._impatient, because=f"{self.name} does not answer")
            return over()
        might_sleep(what)
        if not over() and not self._impatient and self._peer.arrived and self._peer.serve is not None:
            self._peer.serve()
        return over()

    def close(self) -> None:
        """Both ends are closed: what is underway is lost, what has arrived is not."""
        self._closed = self._peer._closed = True
