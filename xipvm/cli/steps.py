"""Signals while something is changed that has to remain whole."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

_Item = TypeVar("_Item")

_ENDING: Final = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""Signals that end a command, and what becomes of each where nobody has said anything else."""


class Steps:
    """What is done to an image is done whole, or not at all: signals wait for the step under way. A context.

    Ctrl-C, SIGTERM and SIGHUP, as far as nobody had them ignored or handled before.
    """

    def __enter__(self) -> Self:
        self._asked = 0
        self._waits = True
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number, usual in _ENDING.items():
                before = signal.getsignal(number)
                if before is usual:
                    self._before[number] = before
                    signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        self._asked = number
        if not self._waits:
            self._check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Nothing is under way for now: no signal waits. Raises KeyboardInterrupt and click's Exit."""
        self._waits = False
        try:
            self._check()
            yield
        finally:
            self._waits = True

    def of(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """``items``, each a step. Raises KeyboardInterrupt and click's Exit between them, and behind the last one."""
        for item in items:
            self._check()
            yield item
        self._check()

    def _check(self) -> None:
        if self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked:
            with suppress(OSError):  # after SIGHUP there may be no terminal
                print(f"xipvm: {signal.strsignal(self._asked)}", file=sys.stderr)
            raise click.exceptions.Exit(128 + self._asked)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if error is None:
            self._check()
