from libc.stdint cimport uint64_t

from xipvm.trace.table cimport Table

cdef enum:
    MAY_WRITE = 2                   # WRITE

cdef class Numbers(Table):
    pass

cdef class Area:
    cdef readonly uint64_t gfn
    cdef readonly uint64_t pages
    cdef readonly uint64_t page

cdef class Range:
    cdef readonly object id
    cdef readonly str mm
    cdef readonly uint64_t start
    cdef readonly uint64_t end
    cdef readonly uint64_t seq
    cdef readonly uint64_t cause
    cdef public str actor
    cdef public bint returned
    cdef public set inside
    cdef public set young
    cdef public list owed

cdef class Entry:
    cdef readonly uint64_t pfn
    cdef readonly uint64_t seq
    cdef public bint write
    cdef public bint young

cdef class Vm:
    cdef readonly str name
    cdef public str mm
    cdef public bint gone
    cdef readonly dict slots
    cdef readonly dict sptes
    cdef readonly dict chiplets
    cdef readonly dict huge
    cdef readonly dict pins
    cdef object page_of(self, uint64_t gfn)

cdef class Process:
    cdef readonly str name
    cdef public str protocol
    cdef public bint dead
    cdef readonly dict entries
    cdef readonly set notifiers
    cdef readonly set intervals
    cdef readonly dict tlbs
    cdef readonly dict devices
    cdef readonly dict iotlbs
    cdef readonly set aged
    cdef public tuple cleared

cdef class World:
    cdef readonly dict mms
    cdef readonly dict vms
    cdef readonly dict tlbs
    cdef readonly dict open
    cdef readonly dict swapped
    cdef readonly Numbers freed
    cdef readonly Numbers written
    cdef readonly Numbers holders
    cpdef Process mm(self, str name)
    cpdef Vm vm(self, str name)
    cpdef int hold(self, dict table, object key, Entry entry) except -1
    cpdef int release(self, dict table, object key) except -1
    cpdef int release_range(self, dict table, uint64_t start, uint64_t end) except -1
    cpdef int release_all(self, dict table) except -1
    cdef int drop(self, uint64_t pfn) except -1

cdef Entry entry_of(uint64_t pfn, bint write, uint64_t seq, bint young)
