from cpython.object cimport PyObject
from libc.stdint cimport uint64_t

from xipvm.trace.emit cimport Listener, Said
from xipvm.trace.table cimport Table

cdef enum:
    INLINE = 6

cdef struct Record:
    PyObject *layout                # lives for ever
    uint64_t seq
    uint64_t cause
    PyObject *time                  # these and what follows are references
    PyObject *actor
    PyObject *values[INLINE]        # or one tuple, when there are more

cdef struct Span:                   # keys of neighbouring pages, half-open
    uint64_t first
    uint64_t end

cdef class History(Listener):
    cdef readonly uint64_t limit
    cdef readonly uint64_t each
    cdef Record *records
    cdef uint64_t count             # of records that are kept
    cdef uint64_t room              # places for records
    cdef uint64_t full              # when so many are kept it is time to sort out
    cdef readonly uint64_t wide              # events of many pages that were forgotten
    cdef dict mms                   # numbers of address spaces, from 0
    cdef Table forgotten            # how many events, by page
    cdef Table kept                 # empty but while sorting out: how many events, and a mask of their kinds, by page
    cdef int keep(self, Said *said) except -1
    cdef int _sort_out(self) except -1
    cdef int _wanted(self, Record *record) except -1
    cdef int _spans(self, Record *record, Span *spans) except -1
    cdef uint64_t _number(self, object mm) except? 0
    cdef int _forget(self, Record *record) except -1
