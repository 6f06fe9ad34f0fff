"""Faults of who watches a range: numbers that are not passed on, lookups that are not asked about, leaving too soon."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from xipvm.actors import point, wait
from xipvm.errors import MmError
from xipvm.explore.mirror import Odp
from xipvm.mutants.mutant import mutant, replaced
from xipvm.notifier import IntervalTree, MmuIntervalNotifier, MmuNotifierRange


@mutant("interval-number-not-set", "M23", "I15", "I7", "I2", protocol="modern")
def interval_number_not_set() -> Iterator[None]:
    """Who watches a range tears down, and does not pass on the number that tells its readers."""
    with replaced(MmuIntervalNotifier, "set_seq", lambda self, seq: None):
        yield


@mutant("interval-number-only-for-entries", "M23 (entries)", "I15", "I7", protocol="modern")
def interval_number_only_for_entries() -> Iterator[None]:
    """Who has nothing to tear down does not pass on the number: a lookup may be on its way."""
    invalidate = Odp.invalidate

    def late(self: Odp, range: MmuNotifierRange, seq: int) -> bool:
        has = any(first <= page < last for first, last in self.pages_in(range.start, range.end) for page in self.table)
        return invalidate(self, range, seq if has else self.invalidate_seq)

    with replaced(Odp, "invalidate", late):
        yield


@mutant("interval-number-not-set-by-who-only-looks", "M23 (looks)", "I15", protocol="modern")
def interval_number_not_set_by_who_only_looks() -> Iterator[None]:
    """Who watches a range and has no translations has nothing to do, it seems: what it looked at is another page's."""
    with replaced(MmuIntervalNotifier, "invalidate", lambda self, range, seq: True):
        yield


@mutant("interval-number-outside-of-the-lock", "M23 (lock)", "I3", "I2", protocol="modern")
def interval_number_outside_of_the_lock() -> Iterator[None]:
    """The number is passed on when everything is torn down and the lock dropped: a reader installs in between."""
    invalidate = Odp.invalidate

    def late(self: Odp, range: MmuNotifierRange, seq: int) -> bool:
        done = invalidate(self, range, self.invalidate_seq)
        point("mutant.unlocked")
        self.set_seq(seq)
        return done

    with replaced(Odp, "invalidate", late):
        yield


@mutant("interval-lookup-begins-at-once", "M28 (interval)", "I15", "I2", protocol="modern")
def interval_lookup_begins_at_once() -> Iterator[None]:
    """read_begin does not wait for the invalidation that is under way: its number is known already."""

    def begin(self: MmuIntervalNotifier) -> int:
        tree = self.subscribed_to
        if tree is None:
            raise MmError(errno.EINVAL, "not inserted")
        tree.mm.trace.emit("mmu_interval_read_begin", mm=tree.mm.name, notifier=self.name, seq=self.invalidate_seq)
        return self.invalidate_seq

    with replaced(MmuIntervalNotifier, "read_begin", begin):
        yield


@mutant("interval-lookup-never-worthless", "M7 (interval)", "I7", "I2", "I4", protocol="modern")
def interval_lookup_never_worthless() -> Iterator[None]:
    """A device that watches a range installs what it looked up without asking whether that counts."""
    with replaced(MmuIntervalNotifier, "read_retry", lambda self, seq: False):
        yield


@mutant("interval-left-without-waiting", "M24", "AssertionError", protocol="modern")
def interval_left_without_waiting() -> Iterator[None]:
    """Who stops watching a range does not wait for the callback that runs."""
    with replaced(IntervalTree, "_remove_later", lambda self, notifier: self._deferred.insert(0, notifier)):
        yield


@mutant("interval-left-by-a-late-number", "5", "deadlock", protocol="modern")
def interval_left_by_a_late_number() -> Iterator[None]:
    """Who stops watching a range reads the number that it waits for a change of when the lock is dropped: too late."""

    def late(self: IntervalTree, notifier: MmuIntervalNotifier) -> None:
        self._deferred.insert(0, notifier)
        point("mutant.unlocked")
        seq = self.seq
        try:
            wait("mmu_interval_notifier_remove", lambda: self.seq != seq)
        except BaseException:
            notifier.subscribed_to = None
            raise

    with replaced(IntervalTree, "_remove_later", late):
        yield
