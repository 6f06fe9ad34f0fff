from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    MAX_FIELDS = 16

cdef enum Space:    # whose pages a field names; the others are of no interest here
    NO_SPACE
    HVA
    GFN
    PFN

cdef enum Role:     # how a field names them
    NO_PAGE
    ADDRESS         # the page of a byte address
    PAGE            # a page number, or as many as the kind's length says
    START           # with END, the field behind it, a half-open range
    RUNS            # a list of (first, count)

cdef class Layout:
    """The declaration of a kind as C code reads it: what is where in ``Said.values``."""
    cdef readonly str name
    cdef readonly tuple names
    cdef readonly int number        # in the order in which kinds were first said
    cdef readonly int count
    cdef int mm                     # which field is the mm, -1 for none
    cdef int length                 # which one stretches the others, -1 for none
    cdef Space spaces[16]
    cdef Role roles[16]
    cdef bint bytes[16]             # of a START: byte addresses

cdef struct Said:
    # An event on its way. Everything is borrowed: who keeps it takes references.
    PyObject *layout
    uint64_t seq
    uint64_t cause
    PyObject *time
    PyObject *actor
    PyObject **values               # as many as the layout's count, in its order

cdef class Listener:
    """A sink that takes events without an :class:`Event` being made. Attach it as any other, or call it with events."""
    cdef int hear(self, Said *said) except -1

cdef class Clock:
    """A clock that is asked without a call of a Python function."""
    cdef object time(self)

cdef class VirtualTime(Clock):
    cdef public int64_t base
    cdef public int64_t start
    cdef public int64_t floor
    cdef object _engine

cdef Layout layout_of(object kind)
cdef object event_of(Said *said)

cdef class Emitter:
    cdef uint64_t _seq
    cdef tuple _sinks
