"""What happened lately, and what happened to each page: kept in memory for reports. See history.pyx."""

from xipvm.trace.emit import Listener
from xipvm.trace.events import Event

class History(Listener):
    """A sink that remembers the last ``limit`` events, and with ``each`` so many of every page at least."""

    def __init__(self, limit: int = 4096, *, each: int = 0) -> None: ...
    @property
    def limit(self) -> int: ...
    @property
    def each(self) -> int: ...
    @property
    def events(self) -> list[Event]:
        """The last ``limit`` events, oldest first."""
    @property
    def kept_records(self) -> int:
        """How many events are remembered in all."""
    @property
    def wide(self) -> int:
        """How many events of very many pages were forgotten."""
    def recall(self, seq: int) -> Event | None:
        """Event number ``seq``, None when it is not remembered any more."""
    def since(self, seq: int) -> list[Event]:
        """What is remembered of the events behind ``seq``, oldest first."""
    def touching(
        self,
        *,
        pfn: int | None = None,
        gfn: int | None = None,
        hva: int | None = None,
        mm: str | None = None,
        last: int = 16,
        kinds: bool = False,
    ) -> list[Event]:
        """The last ``last`` remembered events that name host frame ``pfn``, guest frame ``gfn`` or address ``hva``.

        Oldest first. An event that names any of them counts, by a range or a run too; at ``hva`` those of other
        address spaces than ``mm`` do not, if that is given. With ``kinds`` the last of each kind is there as well.
        """
    def earlier(
        self, *, pfn: int | None = None, gfn: int | None = None, hva: int | None = None, mm: str | None = None
    ) -> int:
        """How many events of that page were forgotten, at least: the most for any of the three that is given."""
