"""Interval notifiers: who watches a range of one mm, and gives up what it looked up when the range was touched.

The collision scheme. A reader does ::

    while True:
        seq = notifier.read_begin()         # waits for an invalidation of it that is under way
        ...                                 # look pages up; may sleep, and fault
        # take the lock that invalidate() takes
        if not notifier.read_retry(seq):
            break                           # install translations, drop the lock
        # drop the lock, start over

and ``invalidate`` takes the lock, calls :meth:`MmuIntervalNotifier.set_seq` and tears down. An invalidation that begins
after ``read_begin`` gives the notifier a new sequence number; one that was running then is waited for.

The numbers. The mm has S, which starts at 2 and is odd while an invalidation runs that touches a notifier: the tree is
frozen then, inserting and removing are put off. Every notifier has s, always odd: that of the last invalidation that
touched it, so s == S says "is being invalidated". Invalidations overlap; S becomes even, and everything that was put
off happens, when the last of them all ends, also of those that touch nobody. The numbers have 64 bits and wrap.

=====================  ======================================================================
start of a range       count it; if it touches notifiers: S becomes odd, ``invalidate(range, S)`` of each
end of a range         count it down; at 0 and if S is odd: S + 1, apply what was put off, wake sleepers
insert, nothing runs   s = S - 1, into the tree
insert, S even         S becomes odd, s = S, into the tree
insert, S odd          s = S, put off
remove, S even         out of the tree
remove, S odd          put off and waited for; an insert that was put off is just forgotten
=====================  ======================================================================
"""

from __future__ import annotations

import errno
from bisect import insort_right
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

from xipvm.actors import wait
from xipvm.errors import InternalError, MmError
from xipvm.locks.check import might_sleep

if TYPE_CHECKING:
    from collections.abc import Callable

    from xipvm.notifier.mm import NotifiedMm
    from xipvm.notifier.range import MmuNotifierRange

ULONG_MAX = (1 << 64) - 1

Finish: TypeAlias = "Callable[[], object]"
"""The second pass of an invalidation: waits until the hardware has done what the first one told it."""


class MmuIntervalNotifier:
    """Base of everything that watches bytes ``[start, last]`` of an mm. ``name`` is for traces and errors.

    :meth:`MmuNotifiers.insert_interval` gives it its range and lets it be told.
    """

    name: str = "interval"

    start: int = 0
    last: int = 0
    """Its last byte."""
    invalidate_seq: int = 1
    """s: the number of the last invalidation that touched it, as ``invalidate`` has said."""
    subscribed_to: IntervalTree | None = None
    """Where it is inserted, until it is removed. Set by the tree."""

    def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
        """Give up every translation of ``range``, which overlaps this one. True.

        Under the lock that readers hold for ``read_retry``: ``set_seq(cur_seq)`` first, unless the range is ignored
        (its ``owner`` is this user, who tears down by itself). False is allowed for a range that is not blockable:
        nothing was done then. Without translations of its own, numbering is all there is to do: the default.
        """
        self.set_seq(cur_seq)
        return True

    def invalidate_start(self, range: MmuNotifierRange, cur_seq: int) -> bool | Finish:
        """The first of two passes, for users whose hardware takes a while: have it begin to give up ``range``.

        All that a range touches are told to begin, then what they returned is called, which waits until it is done.
        Whoever returns True has done everything; that, by ``invalidate``, is the default. Otherwise as ``invalidate``.
        """
        return self.invalidate(range, cur_seq)

    def read_begin(self) -> int:
        """Begins a lookup. Waits while the notifier is being invalidated. What it returns goes to ``read_retry``.

        Raises MmError EDEADLK inside the invalidation that it would wait for, EINVAL when it is not inserted.
        """
        might_sleep("mmu_interval_read_begin")
        tree = self.subscribed_to
        if tree is None:
            raise MmError(errno.EINVAL, f"mmu_interval_read_begin: {self.name} is not inserted")
        seq = self.invalidate_seq
        if seq == tree.seq:
            wait(
                "mmu_interval_read_begin",
                lambda: tree.seq != seq,
                because=f"{self.name} is being invalidated",
                label="notifier.interval.read_begin",
            )
        if tree.mm.trace.on:
            tree.mm.trace.emit("mmu_interval_read_begin", mm=tree.mm.name, notifier=self.name, seq=seq)
        return seq

    def read_retry(self, seq: int) -> bool:
        """Whether what was looked up since ``read_begin`` gave ``seq`` is worthless. Under the user's lock."""
        retry = self.invalidate_seq != seq
        tree = self.subscribed_to
        if tree is not None and tree.mm.trace.on:
            tree.mm.trace.emit("mmu_interval_read_retry", mm=tree.mm.name, notifier=self.name, seq=seq, retry=retry)
        return retry

    def check_retry(self, seq: int) -> bool:
        """A hint, without the lock: True says that ``read_retry`` will be true. False says nothing."""
        return self.invalidate_seq != seq

    def set_seq(self, cur_seq: int) -> None:
        """``invalidate`` owes this to its readers, under the user's lock. ``cur_seq`` is its argument."""
        self.invalidate_seq = cur_seq


class IntervalTree:
    """The interval notifiers of one mm, by ascending start, and the state of their invalidation."""

    __slots__ = ("_deferred", "_tree", "active", "mm", "seq")

    def __init__(self, mm: NotifiedMm) -> None:
        self.mm = mm
        self.seq = 2
        """S."""
        self.active = 0
        """Ranges that began and have not ended, whether or not they touch a notifier."""
        self._tree: list[MmuIntervalNotifier] = []
        self._deferred: list[MmuIntervalNotifier] = []

    def __len__(self) -> int:
        """Notifiers in the tree; an insert that was put off is not yet one, a remove is still one."""
        return len(self._tree)

    @property
    def invalidating(self) -> bool:
        """The tree is frozen."""
        return bool(self.seq & 1)

    @property
    def deferred(self) -> tuple[MmuIntervalNotifier, ...]:
        """What happens when the last range ends, in order: the inserting and removing that was put off."""
        return tuple(self._deferred)

    def insert(self, notifier: MmuIntervalNotifier, start: int, last: int) -> None:
        """Let ``notifier`` watch ``[start, last]``; it is not inserted anywhere yet."""
        notifier.start, notifier.last, notifier.subscribed_to = start, last, self
        if not self.active:
            notifier.invalidate_seq = (self.seq - 1) & ULONG_MAX
        elif self.invalidating:
            notifier.invalidate_seq = self.seq
            self._deferred.insert(0, notifier)
            return
        else:
            self.seq |= 1
            notifier.invalidate_seq = self.seq
        insort_right(self._tree, notifier, key=_start)

    def remove(self, notifier: MmuIntervalNotifier) -> None:
        """No ``invalidate`` of ``notifier`` runs after the return.

        Raises MmError, and it stays: EDEADLK inside an invalidation, EINVAL when somebody is removing it already.
        """
        if not self.invalidating:
            self._tree.remove(notifier)
        elif notifier not in self._tree:
            self._deferred.remove(notifier)
        else:
            self._remove_later(notifier)
        notifier.subscribed_to = None

    def _remove_later(self, notifier: MmuIntervalNotifier) -> None:
        what = f"mmu_interval_notifier_remove: {notifier.name}"
        if notifier in self._deferred:
            raise MmError(errno.EINVAL, f"{what} is being removed")
        seq = self.seq
        self._deferred.insert(0, notifier)
        try:
            wait(what, lambda: self.seq != seq, because="it is being invalidated", label="notifier.interval.remove")
        except BaseException:
            if notifier in self._deferred:
                self._deferred.remove(notifier)
            else:  # the run was aborted after the range had ended
                notifier.subscribed_to = None
            raise

    def begin(self) -> None:
        """A range begins of which nobody is told."""
        self.active += 1

    def start(self, range: MmuNotifierRange, tell: Callable[[MmuIntervalNotifier, int], None]) -> bool:
        """A range begins: tell all that it touches, ``tell`` first. False: one has declined, and the range has ended.

        An exception of a notifier goes on after the range has ended.
        """
        self.active += 1
        hit = [n for n in self._tree if n.start < range.end and range.start <= n.last]
        if not hit:
            return True
        self.seq |= 1
        declined = False
        try:
            with ExitStack() as begun:  # what was begun is finished, whatever happens to the others
                for notifier in hit:
                    tell(notifier, self.seq)
                    answer = notifier.invalidate_start(range, self.seq)
                    if callable(answer):
                        begun.callback(answer)
                    elif not answer:
                        if range.blockable:
                            raise InternalError(f"{notifier.name} declined {range!r}, which may block")
                        declined = True
                        break
        except BaseException:
            self.end()
            raise
        if declined:
            self.end()
        return not declined

    def end(self) -> None:
        """A range ends."""
        self.active -= 1
        if self.active or not self.invalidating:
            return
        self.seq = (self.seq + 1) & ULONG_MAX
        deferred, self._deferred = self._deferred, []
        for notifier in deferred:
            if notifier in self._tree:
                self._tree.remove(notifier)
            else:
                insort_right(self._tree, notifier, key=_start)


def _start(notifier: MmuIntervalNotifier) -> int:
    return notifier.start
