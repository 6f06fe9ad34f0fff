"""The oracle's native part: what happens usually, and cannot be wrong. See usual.pyx."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xipvm.check.rules import Handler
from xipvm.check.world import Range, World
from xipvm.trace.emit import Listener
from xipvm.trace.events import Event
from xipvm.trace.history import History

class Judge(Listener):
    """Who is asked about an event, in order. ``rules``: the Oracle's, by kind; functions of oracle, event, fields."""

    _changes: list[Any]
    last_range: int

    def __init__(
        self,
        rules: Mapping[str, Callable[[Any, Event, Any], None]],
        names: Iterable[str],
        history: History,
        usual: bool,
    ) -> None: ...
    @property
    def events(self) -> int:
        """How many were judged."""
    @property
    def world(self) -> World:
        """What the events have said so far; rules read it."""
    @property
    def history(self) -> History:
        """What is remembered of them."""
    @property
    def checks(self) -> dict[str, int]:
        """How often each invariant was asked. May be added to."""
    @property
    def _returning(self) -> list[Range]: ...
    def on(self, kind: str, handler: Handler, *, since_range: bool = False) -> None:
        """Call ``handler(event, fields)`` at every event of ``kind``, behind the oracle's own rules for it.

        With ``since_range`` only when a range has started or ended, or in 2008 a page was told of, in any mm, behind
        the event that caused this one.
        """
