"""The engines of a machine and the state of its frames: writable, or executable."""

cdef void _before_write(void *ctx, uint64_t pfn) noexcept:
    """The host, a device or the allocator is about to change the bytes of a frame that may have been executed."""
    cdef EngineGroup group = <EngineGroup>ctx
    cdef FrameMeta *meta = group.host.meta_of(pfn)
    if meta != NULL:
        group.revoke_exec(meta, pfn)


@cython.no_gc_clear             # __dealloc__ takes the hook out of `host`
cdef class EngineGroup:
    """See the .pxd. At most 32 engines live at a time."""

    def __init__(self, HostMemory host not None):
        self.host = host
        self.engines = []
        host.code_hook = _before_write
        host.code_ctx = <void *>self

    def close(self):
        """Detaches from the host memory and gives the engines back to the pool."""
        if self.host is not None:
            self.host.code_hook = NULL
            self.host.code_ctx = NULL
        for engine in list(self.engines):
            engine.release()
        self.host = None

    def __dealloc__(self):
        if self.host is not None and self.host.code_ctx == <void *>self:
            self.host.code_hook = NULL
            self.host.code_ctx = NULL

    cdef void revoke_exec(self, FrameMeta *meta, uint64_t pfn) noexcept:
        cdef Engine engine
        cdef uint32_t holders = meta.x_mask | meta.code_mask
        if holders == 0:
            return
        meta.x_mask = 0
        for engine in self.engines:
            if holders & engine.bit:
                if meta.code_mask & engine.bit:
                    engine.drop(pfn)
                engine.flush()
                _kick(&engine.hot, C_KICK_FLUSH)
                if engine.on_drop is not None:
                    engine.report_drop(pfn)
        meta.code_mask = 0

    cdef void revoke_write(self, FrameMeta *meta) noexcept:
        cdef Engine engine
        cdef uint32_t holders = meta.w_mask
        meta.w_mask = 0
        for engine in self.engines:
            if holders & engine.bit:
                engine.flush()

    def drop_code(self, uint64_t pfn, uint64_t count=1):
        """Forget what was translated from frames ``[pfn, pfn + count)``, whose bytes changed or will change."""
        cdef uint64_t n
        cdef FrameMeta *meta
        for n in range(pfn, pfn + count):
            meta = self.host.meta_of(n)
            if meta != NULL and (meta.x_mask | meta.code_mask):
                self.revoke_exec(meta, n)

    def executed(self, uint64_t pfn, uint64_t count):
        """How many of ``count`` frames from ``pfn`` on have translated code."""
        cdef uint64_t n, found = 0
        cdef FrameMeta *meta
        for n in range(pfn, pfn + count):
            meta = self.host.meta_of(n)
            if meta != NULL and meta.code_mask:
                found += 1
        return found
