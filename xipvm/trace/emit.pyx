"""The native part of the funnel: from the arguments of ``emit`` to the sinks.

An event that only native sinks (:class:`Listener`) hear is never an object: they get its fields by position, as C pointers
into the caller's arguments. An :class:`Event` is made when the first sink that is a Python callable comes, once.

``emit`` is a method descriptor made by hand, because its keywords then come as a tuple of names and a C array of
values (vectorcall) and no dictionary is built. The attributes that whoever switches actors sets (``actor``, ``cause``,
``clock``) are slots of the Python class, which the interpreter reads and writes quickest; C finds them by their offset.
"""

from sys import intern

from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport int64_t, uint64_t

from xipvm.errors import BadInput, InternalError
from xipvm.trace.events import KINDS, RUN_TYPES, Event

cdef extern from "structmember.h":
    ctypedef struct PyMemberDef:
        Py_ssize_t offset

cdef extern from "Python.h":
    ctypedef struct PyMemberDescrObject:
        PyMemberDef *d_member
    ctypedef struct PyMethodDef:
        const char *ml_name
        void *ml_meth
        int ml_flags
        const char *ml_doc
    ctypedef struct PyTypeObject:
        PyObject *tp_dict
    int METH_FASTCALL
    int METH_KEYWORDS
    object PyDescr_NewMethod(PyTypeObject *type, PyMethodDef *method)
    void PyType_Modified(PyTypeObject *type)
    PyObject *PyDict_GetItem(object dict, object key)
    int PyDict_SetItem(object dict, object key, object value) except -1
    int PyDict_SetItemString(PyObject *dict, const char *key, object value) except -1
    object PyObject_CallNoArgs(object callable)
    object PyTuple_Pack(Py_ssize_t n, ...)
    Py_ssize_t PyTuple_GET_SIZE(PyObject *tuple)
    PyObject *PyTuple_GET_ITEM(PyObject *tuple, Py_ssize_t index)
    unsigned long long PyLong_AsUnsignedLongLong(object number) except? 0xFFFFFFFFFFFFFFFF
    PyObject *Py_None

cdef dict _layouts = {}
cdef object _make_event = tuple.__new__  # what Event(...) does, without the call of a Python function


cdef class Layout:
    def __init__(self, kind, int number):
        if len(kind.fields) > MAX_FIELDS:
            raise InternalError(f"event kind {kind.name} has more than {MAX_FIELDS} fields")
        self.name = kind.name
        self.names = tuple(intern(field.name) for field in kind.fields)  # as the names of keywords are, see _ordered
        self.number = number
        self.count = len(self.names)
        self.mm = self.names.index("mm") if "mm" in self.names else -1
        self.length = -1
        types = [field.type for field in kind.fields]
        cdef int at
        for at, (name, type_, _) in enumerate(kind.fields):
            self.roles[at] = NO_PAGE
            self.bytes[at] = type_ == "hva"
            self.spaces[at] = {"hva": HVA, "gfn": GFN, "gfns": GFN, "pfn": PFN, "pfns": PFN}.get(type_, NO_SPACE)
            if type_ == "npages":
                self.length = at
            if self.spaces[at] == NO_SPACE:
                continue
            if type_ in RUN_TYPES:
                self.roles[at] = RUNS
            elif name == "start" and self.names[at + 1 : at + 2] == ("end",):
                self.roles[at] = START
            elif name != "end" or "start" not in self.names:
                self.roles[at] = ADDRESS if type_ == "hva" else PAGE


cdef Layout layout_of(object kind):
    """The layout of the kind called ``kind``. Raises InternalError for one that is not declared."""
    cdef PyObject *found = PyDict_GetItem(_layouts, kind)
    if found != NULL:
        return <Layout>found
    declared = KINDS.get(kind)
    if declared is None:
        raise InternalError(f"event {kind} is not declared")
    cdef Layout layout = Layout(declared, len(_layouts))
    _layouts[kind] = layout
    return layout


cdef object event_of(Said *said):
    """``said`` as sinks written in Python see it."""
    cdef Layout layout = <Layout>said.layout
    fields = {}
    cdef int at
    for at in range(layout.count):
        fields[layout.names[at]] = <object>said.values[at]
    return Event(said.seq, <object>said.time, <object>said.actor, said.cause, layout.name, fields)


cdef class Listener:
    cdef int hear(self, Said *said) except -1:
        """Take an event. What it points to is there only during the call."""
        raise NotImplementedError

    def __call__(self, event):
        """Take an event that comes from somewhere else, a file for instance. Raises BadInput if it lacks a field."""
        cdef PyObject *values[MAX_FIELDS]
        cdef Layout layout = layout_of(event[4])
        cdef dict fields = event[5]
        cdef int at
        for at in range(layout.count):
            values[at] = PyDict_GetItem(fields, layout.names[at])
            if values[at] == NULL:
                raise BadInput(f"event #{event[0]}, {layout.name}, does not say its {layout.names[at]}: another version's")
        cdef Said said
        said.layout = <PyObject *>layout
        said.seq = event[0]
        said.cause = event[3]
        said.time = <PyObject *>event[1]
        said.actor = <PyObject *>event[2]
        said.values = values
        self.hear(&said)


cdef PyObject **_ordered(Layout layout, PyObject **given, PyObject *names, PyObject **room) except NULL:
    """The values ``given`` by ``names`` in the order of ``layout``; in ``room``, unless they are so already."""
    cdef Py_ssize_t count = 0 if names == NULL else PyTuple_GET_SIZE(names)
    cdef PyObject *declared = <PyObject *>layout.names
    cdef Py_ssize_t at, other
    if count == layout.count:
        for at in range(count):
            if PyTuple_GET_ITEM(names, at) != PyTuple_GET_ITEM(declared, at):
                break
        else:
            return given
        for at in range(count):
            for other in range(count):
                if <str>PyTuple_GET_ITEM(names, other) == <str>PyTuple_GET_ITEM(declared, at):
                    room[at] = given[other]
                    break
            else:
                break
        else:
            return room
    said = [] if names == NULL else sorted(<tuple>names)
    raise InternalError(f"event {layout.name} has fields {said}, it is declared with {list(layout.names)}")


cdef object _event(Said *said, object kind, PyObject **given, PyObject *names):
    """The event with the fields as they were ``given``, declared or not."""
    cdef dict fields = {}
    cdef Py_ssize_t at
    if names != NULL:
        for at in range(PyTuple_GET_SIZE(names)):
            PyDict_SetItem(fields, <object>PyTuple_GET_ITEM(names, at), <object>given[at])
    return _make_event(Event, (said.seq, <object>said.time, <object>said.actor, said.cause, kind, fields))


cdef class Clock:
    cdef object time(self):
        """Virtual time, ns."""
        raise NotImplementedError

    def __call__(self):
        """Virtual time, ns."""
        return self.time()


cdef class VirtualTime(Clock):
    """Time that an engine makes go on while it runs: ``base``, and what it has ticked since ``start``; ns.

    ``floor``: no earlier time is told.
    """

    def __init__(self):
        self.base = self.start = self.floor = 0

    cdef object time(self):
        cdef int64_t now = self.base
        if self._engine is not None:
            now += <int64_t>self._engine.ticks - self.start
        return now if now > self.floor else self.floor

    def enter(self, engine):
        """From here on ``engine`` runs: an object with ``ticks`` and ``time_offset``, which is time less ticks."""
        self._engine = engine
        self.start = engine.ticks
        engine.time_offset = self.base - self.start

    def leave(self, bint counts):
        """It runs no longer. What it has ticked is added to ``base`` if it ``counts``."""
        if counts and self._engine is not None:
            self.base += <int64_t>self._engine.ticks - self.start
        self._engine = None


cdef Py_ssize_t _actor, _cause, _clock      # where the slots are, see bind()
cdef object _still = None                   # the clock that says 0
cdef object _zero = 0


cdef inline PyObject **_slot(Emitter trace, Py_ssize_t offset) noexcept:
    return <PyObject **>(<char *><PyObject *>trace + offset)


cdef object _emit(PyObject *self, PyObject **args, Py_ssize_t nargs, PyObject *names):
    """Tell every sink that ``kind`` happened. Returns its sequence number, 0 when nobody listens."""
    cdef Emitter trace = <Emitter>self
    cdef PyObject *room[MAX_FIELDS]
    cdef Said said
    if nargs != 1:
        raise TypeError(f"emit takes the kind and fields by name, not {nargs} positional arguments")
    cdef tuple sinks = trace._sinks
    if not sinks:
        return 0
    kind = <object>args[0]
    actor = <object>_slot(trace, _actor)[0]
    clock = <object>_slot(trace, _clock)[0]
    if isinstance(clock, Clock):
        time = (<Clock>clock).time()
    else:
        time = _zero if clock is _still else PyObject_CallNoArgs(clock)
    trace._seq += 1
    said.layout = NULL
    said.seq = trace._seq
    said.cause = PyLong_AsUnsignedLongLong(<object>_slot(trace, _cause)[0])
    said.time = <PyObject *>time
    said.actor = <PyObject *>actor
    event = None
    for sink in sinks:
        if isinstance(sink, Listener):
            if said.layout == NULL:
                layout = layout_of(kind)
                said.layout = <PyObject *>layout
                said.values = _ordered(layout, args + 1, names, room)
            (<Listener>sink).hear(&said)
        else:
            if event is None:
                event = _event(&said, kind, args + 1, names)
            sink(event)
    return said.seq


cdef class Emitter:
    def __cinit__(self, *_, **__):
        self._sinks = ()

    @property
    def seq(self):
        """Sequence number of the last event."""
        return self._seq

    def _attach(self, sink):
        self._sinks = (*self._sinks, sink)

    def _detach(self, sink):
        """Whether somebody still listens."""
        sinks = list(self._sinks)
        sinks.remove(sink)
        self._sinks = tuple(sinks)
        return bool(sinks)

    def because(self, seq):
        """A context in which events are caused by event ``seq``; afterwards the old cause is back."""
        cdef Because made = Because.__new__(Because)
        made._trace = self
        made._seq = seq
        return made


cdef class Because:
    """What :meth:`Emitter.because` returns."""

    cdef Emitter _trace
    cdef object _seq
    cdef object _before

    def __enter__(self):
        cdef PyObject **slot = _slot(self._trace, _cause)
        self._before = <object>slot[0]
        _set(slot, self._seq)

    def __exit__(self, kind, error, tb):
        _set(_slot(self._trace, _cause), self._before)


cdef inline void _set(PyObject **slot, object value) noexcept:
    cdef PyObject *old = slot[0]
    Py_INCREF(value)
    slot[0] = <PyObject *>value
    Py_XDECREF(old)


cdef PyMethodDef _method
_method.ml_name = b"emit"
_method.ml_meth = <void *>_emit
_method.ml_flags = METH_FASTCALL | METH_KEYWORDS
_method.ml_doc = b"""emit($self, kind, /, **fields)
--

Tell every sink that ``kind`` happened. Returns its sequence number, 0 when nobody listens.

``fields`` are those that xipvm.trace.events.KINDS declares; sinks that encode or judge
them raise InternalError for others."""
PyDict_SetItemString((<PyTypeObject *>Emitter).tp_dict, b"emit", PyDescr_NewMethod(<PyTypeObject *>Emitter, &_method))
PyType_Modified(<PyTypeObject *>Emitter)


def bind(type trace, still):
    """``trace`` is the subclass that has the slots; ``still`` the clock that need not be asked, as it always says 0."""
    global _actor, _cause, _clock, _still
    _actor = (<PyMemberDescrObject *>trace.actor).d_member.offset
    _cause = (<PyMemberDescrObject *>trace.cause).d_member.offset
    _clock = (<PyMemberDescrObject *>trace.clock).d_member.offset
    _still = still
