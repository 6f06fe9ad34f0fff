"""What a step read and wrote: the footprints by which the search tells which steps depend on each other.

A step is what one actor does between two schedule points. Two steps depend on each other when both touch a resource
and one of them writes to it. A resource is an attribute of an object of the model, what a list or dictionary holds,
an entry of a page table, a frame's bytes or metadata, a lock. Nobody has to declare what he touches:

* while a :func:`recording` is open, attributes of all classes of the model (MODEL) are watched, as they are read and
  as they are set. A class of a scenario's own is watched when it is derived from one of them;
* a container that was reached through an attribute counts as read as a whole, its containers included, and as written
  when it holds something else at the end of the step. Who keeps one, or an iterator over one, over the end of a step
  is told by its reference count, and reads it in the next step, too;
* page tables and host memory are native, and are replaced by subclasses whose methods say what they touch;
* locks, and SRCU, say what they are (:func:`xipvm.actors.access`): readers do not depend on each other;
* every event of the trace touches the pages and the vCPUs that it names, for the oracle's sake.

What is not understood makes the step *unknown*, and that depends on everything: an attribute of a type that is none of
the above, a native method that nobody has described here, an actor whose code reaches objects that nobody watches
(closures.py). So what is missing here costs reduction, and no schedule. Not watched at all are the trace, the checks
of locks and the oracle: nothing that an actor does hangs on them.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from types import (
    BuiltinFunctionType,
    FunctionType,
    GenericAlias,
    MappingProxyType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    NoneType,
)
from typing import Any, Final

from xipvm import actors
from xipvm.actors import Actor
from xipvm.locks.gate import Gate
from xipvm.locks.lock import Keyed, KeyedLocks, Reading, RwLock, Writing
from xipvm.locks.order import LockClass
from xipvm.notifier.srcu import Srcu
from xipvm.trace.funnel import Trace

MODEL: Final = ("xipvm.mmu", "xipvm.notifier", "xipvm.devices", "xipvm.xip", "xipvm.xpmem")
"""Packages whose classes are watched."""
_MORE: Final = ("xipvm.explore.scripted", "xipvm.explore.shared", "xipvm.flash_memory", "xipvm.mutants")

Key = tuple[Hashable, Hashable]
"""The name of an object, and what of it. Names are the same in every run of the scenario in which the same steps made
the object: they tell which step did, and that it was the how-manieth of it. Texts name themselves."""
Range = tuple[Hashable, int, int, bool]
"""The name of an object, numbers ``[first, end)`` of it, and whether they are written."""

_CODE: Final = frozenset(
    (MethodType, FunctionType, BuiltinFunctionType, MethodWrapperType, type, ModuleType, GenericAlias, property)
)
_VALUES: Final = frozenset((int, str, bytes, float, bool, NoneType, range, frozenset, complex, MappingProxyType))
_DECLARED: Final = frozenset((RwLock, Reading, Writing, KeyedLocks, Keyed, Gate, LockClass, Srcu, Trace, Actor))
_CONTAINERS: Final = frozenset(
    (list, dict, set, deque, OrderedDict, defaultdict, bytearray, weakref.WeakValueDictionary, weakref.WeakSet)
)
_DESCRIPTORS: Final = frozenset(("fd", "_fd"))
"""Attributes that stand for a file of the host: who looks at one may write to the file."""

VIEWS: Final = "bytes behind memoryviews"
"""A resource: whoever looks at a memoryview may write to what it shows."""
_KNOWN: Final = _CODE | _VALUES | _DECLARED
_FEW: Final = 8
"""So many numbers are said one by one."""
_REFERENCES: Final = 6
"""Of a container that has one owner, as _held sees it: owner, name, snapshot, variables, argument."""


class Footprint:
    """What one step touched."""

    __slots__ = ("numbers", "ranges", "reads", "unknown", "writes")

    def __init__(self) -> None:
        self.numbers: list[tuple[Hashable, int, bool]] = []
        """Those of the resources that are numbers: what they belong to, and whether they are written."""
        self.reads: set[Key] = set()
        self.writes: set[Key] = set()
        self.ranges: list[Range] = []
        self.unknown = False

    def conflicts(self, other: Footprint) -> bool:
        """The two steps depend on each other."""
        if self.unknown or other.unknown:
            return True
        mine, others = self.writes, other.writes
        if not (mine.isdisjoint(others) and mine.isdisjoint(other.reads) and others.isdisjoint(self.reads)):
            return True
        if self.ranges and any(_meets(each, other) for each in self.ranges):
            return True
        return bool(other.ranges) and any(_meets(each, self) for each in other.ranges)

    def why(self, other: Footprint) -> set[Key]:
        """Single resources for which they do."""
        return self.writes & (other.writes | other.reads) | other.writes & self.reads


def _meets(span: Range, print_: Footprint) -> bool:
    owner, first, end, write = span
    if any(whose == owner and (write or wrote) and first <= number < end for whose, number, wrote in print_.numbers):
        return True
    return any(
        other[0] == owner and (write or other[3]) and first < other[2] and other[1] < end for other in print_.ranges
    )


class Recorder:
    """Footprints of one run. :meth:`begin` a step, :meth:`end` it; in between it is the one that is told.

    Made before the scene is, which it watches being furnished, to know the names of what there is.
    """

    def __init__(self) -> None:
        self.print = Footprint()
        self.not_understood: set[str] = set()
        """Why steps were unknown."""
        self._names: dict[int, int] = {}
        """By ``id``."""
        self._alive: list[object] = []
        """What has a name, so that no ``id`` is used twice."""
        self._base = 0
        """The first name that the step may give."""
        self._saw: set[tuple[int, str, int]] = set()
        """What the step was told before."""
        self._seen: dict[int, tuple[Any, Key, Any]] = {}
        """By container: itself, what it is, and what it held when the step first saw it."""
        self._kept: dict[int, list[tuple[Any, Key]]] = {}
        """Containers that an actor holds over the end of its last step."""
        _listen(self)

    def begin(self, actor: int, number: int) -> None:
        """Actor ``actor`` goes on with its step ``number``."""
        self.print = Footprint()
        self._saw.clear()
        self._seen = {}
        self._base = (actor + 1) << 48 | number << 24
        for container, key in self._kept.pop(actor, ()):
            self._look(container, key)
        _listen(self)

    def pause(self) -> None:
        """What happens now is nobody's step."""
        _listen(None)

    def go_on(self) -> None:
        """What happens now is a step again."""
        _listen(self)

    def end(self, actor: int) -> Footprint:
        """The step is over."""
        _listen(None)
        kept: list[tuple[Any, Key]] = []
        for container, key, before in list(self._seen.values()):
            if not _same(container, before):
                self.print.writes.add(key)
                self._name_parts(container)
            if _held(container):
                kept.append((container, key))
        self._seen = {}
        if kept:
            self._kept[actor] = kept
        return self.print

    @property
    def listens(self) -> bool:
        """A step is being made."""
        return _now is self

    # ---- what is told

    def saw(self, owner: object, name: str, value: object) -> None:
        """Attribute ``name`` of ``owner`` was read, and is ``value``."""
        saw = id(owner), name, id(value)
        if saw in self._saw:
            return
        self._saw.add(saw)
        kind = type(value)
        key = self._name(owner), name
        self.print.reads.add(key)
        if kind in _VALUES:
            if name in _DESCRIPTORS:
                self.print.writes.add(key)
        elif kind not in _watched and kind not in _DECLARED:
            self._value(owner, name, value, kind)

    def set(self, owner: object, name: str, value: object = None) -> None:
        """Attribute ``name`` of ``owner`` is set to ``value``."""
        self.print.writes.add((self.born(owner), name))
        if type(value) in _CONTAINERS:
            self.born(value)
            self._name_parts(value)

    def access(self, owner: object, what: Hashable, write: bool) -> None:
        """Somebody says that he touches ``what`` of ``owner``."""
        name = self._name(owner)
        (self.print.writes if write else self.print.reads).add((name, what))
        if type(what) is int:
            self.print.numbers.append((name, what, write))

    def access_range(self, owner: object, first: int, end: int, write: bool) -> None:
        """Somebody says that he touches all numbers of ``[first, end)`` of ``owner``."""
        name = self._name(owner)
        if end - first <= _FEW:
            for at in range(first, end):
                (self.print.writes if write else self.print.reads).add((name, at))
                self.print.numbers.append((name, at, write))
        else:
            self.print.ranges.append((name, first, end, write))

    def dont_know(self, why: str) -> None:
        """The step does something that is not understood."""
        self.print.unknown = True
        self.not_understood.add(why)

    def born(self, thing: object) -> int:
        """The name of ``thing``, which may just have been made."""
        name = self._names.get(id(thing))
        if name is None:
            self._base += 1
            self._names[id(thing)] = name = self._base
            self._alive.append(thing)
        return name

    def _name(self, thing: object) -> Hashable:
        name = self._names.get(id(thing))
        if name is None:
            if type(thing) is str:
                return thing
            if self._base >> 48:
                self.dont_know(f"a {type(thing).__name__} of unknown origin")
            return self.born(thing)
        return name

    def _value(self, owner: object, name: str, value: Any, kind: type) -> None:
        if kind in _CONTAINERS:
            self._look(value)
        elif kind is tuple or kind is partial:
            for part in value if kind is tuple else (value.func, *value.args, *value.keywords.values()):
                inner = type(part)
                if inner not in _KNOWN and inner not in _watched:
                    self._value(owner, name, part, inner)
        elif kind is memoryview:
            self.print.writes.add((VIEWS, ""))
        elif not is_watched(kind):
            self.dont_know(f"{type(owner).__name__}.{name} is a {kind.__module__}.{kind.__qualname__}")

    def _look(self, container: Any, key: Key | None = None) -> None:
        """A container can be read from here on, and changed."""
        number = id(container)
        if number in self._seen:
            return
        if key is None:
            key = self._name(container), "holds"
        self.print.reads.add(key)
        held = _contents(container)
        self._seen[number] = container, key, held
        if type(held) is list:
            for each in held:
                inner = type(each)
                if inner not in _KNOWN and inner not in _watched:
                    self._value(container, "item", each, inner)

    def _name_parts(self, container: Any) -> None:
        """Names the containers that somebody has put into ``container``."""
        held = _contents(container)
        for each in held if type(held) is list else ():
            if type(each) in _CONTAINERS and id(each) not in self._names:
                self.born(each)
                self._name_parts(each)


def _contents(container: Any) -> Any:
    kind = type(container)
    if kind is bytearray:
        return bytes(container)
    if kind is weakref.WeakValueDictionary or issubclass(kind, dict):
        return list(itertools.chain.from_iterable(container.items()))
    return list(container)


def _same(container: Any, before: Any) -> bool:
    """It holds the very objects that it did, in that order."""
    now = _contents(container)
    return len(now) == len(before) and all(map(_is, now, before))


def _is(one: object, other: object) -> bool:
    return one is other or (type(one) is int and one == other)


def _held(container: Any) -> bool:
    """Somebody but its owner refers to it."""
    return sys.getrefcount(container) > _REFERENCES


def _harmless(kind: type) -> bool:
    """Objects of ``kind`` do not change, or are described elsewhere."""
    if issubclass(kind, (Enum, BaseException, type)) or kind.__module__ == "xipvm.mmu.tables":
        return True
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return True
    return bool(getattr(kind, "__dataclass_params__", None)) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


# ---- watching the model

_now: Recorder | None = None
"""Who is told, if anybody is."""
_watched: set[type] = set()
"""Classes whose attributes are watched now, derived ones included."""
_open = 0


def _listen(recorder: Recorder | None) -> None:
    global _now
    _now = recorder
    if recorder is None:
        actors.on_access(None, None, None)
    else:
        actors.on_access(recorder.access, recorder.access_range, recorder.born)


def _classes() -> list[type]:
    """The classes of the model, as far as their objects can change."""
    found: list[type] = []
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith((*MODEL, *_MORE)):
            continue
        for each in vars(module).values():
            if isinstance(each, type) and each.__module__ == name and each not in _DECLARED and not _harmless(each):
                found.append(each)
    return found


def _import_model() -> None:
    for name in MODEL:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if module.name not in sys.modules:
                importlib.import_module(module.name)
    for name in ("xipvm.explore.shared", "xipvm.flash_memory"):
        importlib.import_module(name)


def _watch(kind: type) -> Callable[[], None] | None:
    """Watches the attributes of ``kind``; the result ends it. None where that cannot be."""
    base: Any = kind
    read, write, delete = base.__getattribute__, base.__setattr__, base.__delattr__

    def getattribute(self: Any, name: str) -> Any:
        value = read(self, name)
        if _now is not None and type(value) not in _CODE:
            _now.saw(self, name, value)
        return value

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if _now is not None:
            _now.set(self, name, value)
        write(self, name, value)

    def delete_attribute(self: Any, name: str) -> None:
        if _now is not None:
            _now.set(self, name)
        delete(self, name)

    hooks = {"__getattribute__": getattribute, "__setattr__": set_attribute, "__delattr__": delete_attribute}
    own = {name: vars(kind)[name] for name in hooks if name in vars(kind)}
    try:
        for name, hook in hooks.items():
            setattr(kind, name, hook)
    except TypeError:  # native
        return None

    def undo() -> None:
        for name in hooks:
            if name in own:
                setattr(kind, name, own[name])
            else:
                delattr(kind, name)

    return undo


def _derived(kind: type) -> Iterator[type]:
    yield kind
    derived: list[type] = type.__subclasses__(kind)
    for each in derived:
        yield from _derived(each)


@contextmanager
def recording() -> Iterator[None]:
    """Footprints can be had while the context is open, in the whole process; contexts nest. Things are slower then."""
    global _open
    from xipvm.explore.native import replaced  # which is derived from what is replaced

    if _open:
        _open += 1
        try:
            yield
        finally:
            _open -= 1
        return
    _import_model()
    undo: list[Callable[[], None]] = []
    with replaced(MODEL) as natives:
        try:
            for kind in _classes():
                if kind not in natives and not any(base in _watched for base in kind.__mro__[1:]):
                    done = _watch(kind)
                    if done is None:
                        continue
                    undo.append(done)
                    _watched.update(_derived(kind))
            _watched.update(natives)
            _open = 1
            yield
        finally:
            _open = 0
            _listen(None)
            _watched.clear()
            for each in reversed(undo):
                each()


def is_watched(kind: type) -> bool:
    """Attributes of objects of ``kind`` are watched, or there is nothing to watch."""
    if kind in _watched or kind in _DECLARED or kind in _VALUES or kind in _CODE or _harmless(kind):
        return True
    if any(base in _watched for base in kind.__mro__):
        _watched.add(kind)  # made since
        return True
    return False


def current() -> Recorder | None:
    """Who is told now, if anybody is."""
    return _now
