"""Modelled locks: who may run beside whom at a schedule point, and whether the rules of locking are kept.

:class:`RwLock` and :class:`KeyedLocks` are the locks, :class:`Gate` is for what is frozen, order.py has their classes;
``with checking():`` has every use of them checked (check.py).
"""

from xipvm.locks.check import Checker, atomic, checking, might_sleep, nothing_held, sleep_until
from xipvm.locks.gate import Gate
from xipvm.locks.lock import KeyedLocks, RwLock
from xipvm.locks.order import LockClass

__all__ = [
    "Checker",
    "Gate",
    "KeyedLocks",
    "LockClass",
    "RwLock",
    "atomic",
    "checking",
    "might_sleep",
    "nothing_held",
    "sleep_until",
]
