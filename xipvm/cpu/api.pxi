"""The engine's functions, looked up in the library that its wheel carries."""

class EngineError(InternalError):
    """The emulation engine refused a call it should accept."""


cdef void *_symbol(void *handle, const char *name) except NULL:
    cdef void *address = dlsym(handle, name)
    if address == NULL:
        raise EngineError(f"the unicorn library has no {name.decode()}")
    return address


cdef int _load() except -1:
    """Looks the engine's functions up in the library that the unicorn wheel carries."""
    global api_loaded
    spec = importlib.util.find_spec("unicorn")
    if spec is None or spec.origin is None:
        raise EngineError("the unicorn package is not installed")
    path = os.path.join(os.path.dirname(spec.origin), "lib", "libunicorn.so.2")
    cdef bytes encoded = path.encode()
    cdef void *handle = dlopen(encoded, RTLD_NOW)
    if handle == NULL:
        raise EngineError(f"{path}: {dlerror().decode()}")
    api.open = <uc_open_t>_symbol(handle, "uc_open")
    api.close = <uc_close_t>_symbol(handle, "uc_close")
    api.ctl = <uc_ctl_t>_symbol(handle, "uc_ctl")
    api.emu_start = <uc_emu_start_t>_symbol(handle, "uc_emu_start")
    api.emu_stop = <uc_emu_stop_t>_symbol(handle, "uc_emu_stop")
    api.hook_add = <uc_hook_add_t>_symbol(handle, "uc_hook_add")
    api.hook_del = <uc_hook_del_t>_symbol(handle, "uc_hook_del")
    api.reg_read = <uc_reg_t>_symbol(handle, "uc_reg_read")
    api.reg_write = <uc_reg_t>_symbol(handle, "uc_reg_write")
    api.mem_map_ptr = <uc_mem_map_ptr_t>_symbol(handle, "uc_mem_map_ptr")
    api.mem_unmap = <uc_mem_unmap_t>_symbol(handle, "uc_mem_unmap")
    api.mmio_map = <uc_mmio_map_t>_symbol(handle, "uc_mmio_map")
    api.strerror = <uc_strerror_t>_symbol(handle, "uc_strerror")
    api.version = <uc_version_t>_symbol(handle, "uc_version")
    api.context_alloc = <uc_context_alloc_t>_symbol(handle, "uc_context_alloc")
    api.context_save = <uc_context_t>_symbol(handle, "uc_context_save")
    api.context_restore = <uc_context_t>_symbol(handle, "uc_context_restore")
    api.context_free = <uc_context_free_t>_symbol(handle, "uc_context_free")
    api_loaded = True
    return 0


cdef int _check(uc_err code, str what) except -1:
    if code != UC_ERR_OK:
        raise EngineError(f"{what}: {api.strerror(code).decode()}")
    return 0
