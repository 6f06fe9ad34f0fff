"""What each op of a scenario does: one function an op, in the table :data:`STEPS`.

A function gets the world and the arguments of the step and returns what it observed itself, by the names of ``expect``
(``rc``, ``exit``, ``value``, ...). Errors of the model become ``rc`` and ``errno`` or ``signal`` in :func:`execute`. An
operation that the model does not have raises UnsupportedError; what the model may lack is looked up by its Linux name.

The file is long because there are many ops: it is one table, and each of its functions has a few lines.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.conform.guest import Access, Vcpu
from xipvm.conform.scenario import Step, fill_values
from xipvm.conform.world import BASE, UnsupportedError, Vm, World, hva, method
from xipvm.errors import MmError
from xipvm.mmu import madvise, pagemap, uffd_message, uffd_wp, userfaultfd, vma
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.host_thread import HostAccessError
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import MS_ASYNC, MS_SYNC
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import PageCache, ShmemFile
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY

Args = dict[str, Any]
Observed = dict[str, Any]

_RIGHTS: Final = {"r": vma.PROT_READ, "w": vma.PROT_WRITE, "x": vma.PROT_EXEC}
_SLOT_FLAGS: Final = {"READONLY": MEM_READONLY, "LOG_DIRTY_PAGES": MEM_LOG_DIRTY_PAGES}
_UFFD_FLAGS: Final = {
    "write": uffd_message.UFFD_PAGEFAULT_FLAG_WRITE,
    "wp": uffd_message.UFFD_PAGEFAULT_FLAG_WP,
    "minor": uffd_message.UFFD_PAGEFAULT_FLAG_MINOR,
}
_UFFD_FEATURES: Final = {
    "WP_ASYNC": uffd_wp.UFFD_FEATURE_WP_ASYNC,
    "WP_UNPOPULATED": uffd_wp.UFFD_FEATURE_WP_UNPOPULATED,
}
_UFFD_MODES: Final = {
    "MISSING": userfaultfd.UFFDIO_REGISTER_MODE_MISSING,
    "WP": userfaultfd.UFFDIO_REGISTER_MODE_WP,
    "MINOR": userfaultfd.UFFDIO_REGISTER_MODE_MINOR,
}
_SPIN_LIMIT: Final = 10_000
_DONE: Final = {"rc": 0}


def execute(world: World, step: Step) -> tuple[Observed, str]:
    """Does one step; what it observed, and if it failed, why. Raises UnsupportedError."""
    try:
        with world.running():
            return {"uffd": world.messages, **STEPS[step.op](world, step.args)}, ""
    except HostAccessError as error:
        return {"signal": error.signal}, str(error)
    except MmError as error:
        return {"rc": -1, "errno": errno.errorcode.get(error.errno, str(error.errno))}, str(error)


def _range(args: Args) -> tuple[int, int]:
    """(address, bytes)"""
    return hva(args["space"], args["start"]), (args["end"] - args["start"]) << PAGE_SHIFT


def _prot(text: str) -> int:
    return sum(_RIGHTS[letter] for letter in text)


def _word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _hex(data: bytes) -> str:
    return hex(int.from_bytes(data, "little"))


def _values(args: Args, place: str) -> Iterator[tuple[int, int]]:
    """(page, value) of what a step stores: one page, or a fill."""
    if "fill" in args:
        yield from fill_values(args["fill"])
    else:
        yield args[place], int(args["value"], 16)


# ---- mappings and memory of the host process


def _mmap(world: World, args: Args) -> Observed:
    flags = vma.MAP_SHARED if args["share"] == "shared" else vma.MAP_PRIVATE
    # A space is free where nothing was mapped: an error there would be one of the scenario.
    flags |= vma.MAP_FIXED if args.get("fixed") else vma.MAP_FIXED_NOREPLACE
    if args["kind"] == "hugetlb":
        flags |= vma.MAP_ANONYMOUS | method(vma, "MAP_HUGETLB", "mmap of hugetlb")
    elif args["kind"] == "anon":
        flags |= vma.MAP_ANONYMOUS
    world.mm.mmap(
        args["pages"] << PAGE_SHIFT,
        _prot(args["prot"]),
        flags,
        addr=hva(args["space"], args["page"]),
        file=world.files[args["file"]] if args["kind"] == "file" else None,
        pgoff=args.get("file_page", 0),
    )
    return _DONE


def _munmap(world: World, args: Args) -> Observed:
    world.mm.munmap(*_range(args))
    return _DONE


_MREMAP_FLAGS: Final = {"MAYMOVE": MREMAP_MAYMOVE, "FIXED": MREMAP_FIXED, "DONTUNMAP": MREMAP_DONTUNMAP}


def _mremap(world: World, args: Args) -> Observed:
    addr, length = _range(args)
    to = args.get("to")
    world.mm.mremap(
        addr,
        length,
        args["new_pages"] << PAGE_SHIFT,
        sum(_MREMAP_FLAGS[flag] for flag in args["flags"]),
        hva(to["space"], to["page"]) if to else None,
    )
    return _DONE


def _mremap_each(world: World, args: Args) -> Observed:
    to = args["to"]
    for number in range(args["count"]):
        source, target = hva(args["space"], number * args["stride"]), hva(to["space"], to["page"] + number)
        world.mm.mremap(source, PAGE_SIZE, PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, target)
    return _DONE


def _mprotect(world: World, args: Args) -> Observed:
    world.mm.mprotect(*_range(args), _prot(args["prot"]))
    return _DONE


def _madvise(world: World, args: Args) -> Observed:
    advice = method(madvise, f"MADV_{args['advice']}", f"madvise {args['advice']}")
    world.mm.madvise(*_range(args), advice)
    return _DONE


def _madvise_loop(world: World, args: Args) -> Observed:
    for _ in range(args["milliseconds"]):
        _madvise(world, args)
    return _DONE


def _mlock(world: World, args: Args) -> Observed:
    world.mm.mlock(*_range(args))
    return _DONE


def _munlock(world: World, args: Args) -> Observed:
    world.mm.munlock(*_range(args))
    return _DONE


def _msync(world: World, args: Args) -> Observed:
    world.mm.msync(*_range(args), MS_SYNC if args["mode"] == "sync" else MS_ASYNC)
    return _DONE


def _clear_refs(world: World, args: Args) -> Observed:
    world.mm.clear_refs(args["mode"])
    return _DONE


def _host_read(world: World, args: Args) -> Observed:
    return {"value": _hex(world.thread.load(hva(args["space"], args["page"]), 8))}


def _host_write(world: World, args: Args) -> Observed:
    offset, size = args.get("offset", 0), args.get("bytes", 8)
    for page, value in _values(args, "page"):
        world.thread.store(hva(args["space"], page) + offset, _word(value)[:size])
    return {}


def _host_check(world: World, args: Args) -> Observed:
    pages = args["range"]
    value = _word(int(args["value"], 16))
    found = [
        world.thread.load(hva(args["space"], page), 8)
        for page in range(pages["start"], pages["end"], pages.get("step", 1))
    ]
    return {"wrong": sum(word != value for word in found)}


def _proc_mem_write(world: World, args: Args) -> Observed:
    return {"rc": world.mm.access_remote_vm(hva(args["space"], args["page"]), _word(int(args["value"], 16)))}


def _direct_read_into(world: World, args: Args) -> Observed:
    # The device writes to the pages themselves, which are looked up for writing and held as for any copy to user space.
    world.mm.write(hva(args["space"], args["page"]), _word(int(args["value"], 16)).ljust(PAGE_SIZE, b"\0"))
    return {"rc": PAGE_SIZE}


def _pagemap_scan(world: World, args: Args) -> Observed:
    addr, length = _range(args)
    base = BASE[args["space"]]
    found = world.mm.pagemap_scan(
        addr,
        addr + length,
        flags=pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC if args["write_protect"] else 0,
        category_mask=pagemap.PAGE_IS_WRITTEN,
        return_mask=pagemap.PAGE_IS_WRITTEN,
    ).regions
    written = [[(start - base) >> PAGE_SHIFT, (end - base) >> PAGE_SHIFT] for start, end, _ in found]
    return {"rc": len(written), "written": written}


def _numa_move(world: World, args: Args) -> Observed:
    if args["via"] == "mbind":
        world.mm.mbind(*_range(args), args["node"])
        return _DONE
    return {"rc": sum(status < 0 for status in world.mm.move_pages(*_range(args), args["node"]))}


def _exit(world: World, args: Args) -> Observed:
    world.mm.exit()
    return {}


# ---- files


def _file_create(world: World, args: Args) -> Observed:
    name, pages = args["file"], args["pages"]
    content = bytearray(pages << PAGE_SHIFT)
    if args["contents"] is not None:
        for page, value in fill_values(args["contents"]):
            content[page << PAGE_SHIFT : (page << PAGE_SHIFT) + 8] = _word(value)
        del content[pages << PAGE_SHIFT :]
    if args["fs"] == "shmem":
        shmem = ShmemFile(world.host, world.trace, name, len(content))
        if args["contents"] is not None:
            shmem.pwrite(0, bytes(content))
        world.files[name] = shmem
        return _DONE
    path = Path(world.folder, f"file{len(world.files)}")
    with path.open("wb") as disk:
        if args["contents"] is not None:
            disk.write(content)
        disk.truncate(len(content))
    file = HostFile(world.host, world.trace, os.fspath(path), writable=True)
    if args["page_cache"] == "clean":
        file.readahead(0, pages)
    elif args["page_cache"] == "dirty":
        file.pwrite(0, bytes(content))
    world.files[name] = file
    return _DONE


def _file(world: World, args: Args) -> PageCache:
    return world.files[args["file"]]


def _ftruncate(world: World, args: Args) -> Observed:
    _file(world, args).truncate(int(args["pages"] * PAGE_SIZE))
    return _DONE


def _fallocate(world: World, args: Args) -> Observed:
    _file(world, args).punch_hole(args["start"], args["end"] - args["start"])
    return _DONE


def _pwrite(world: World, args: Args) -> Observed:
    offset, word = args["page"] << PAGE_SHIFT, _word(int(args["value"], 16))
    if args["direct"]:
        method(_file(world, args), "direct_write", "pwrite direct")(offset, word.ljust(PAGE_SIZE, b"\0"))
        return {"rc": PAGE_SIZE}
    _file(world, args).pwrite(offset, word)
    return {"rc": 8}


def _pread(world: World, args: Args) -> Observed:
    data = _file(world, args).pread(args["page"] << PAGE_SHIFT, 8)
    return {"rc": len(data), "value": _hex(data)}


def _fsync(world: World, args: Args) -> Observed:
    _file(world, args).fsync()
    return _DONE


def _fadvise(world: World, args: Args) -> Observed:
    method(_file(world, args), "fadvise_dontneed", "fadvise")()
    return _DONE


# ---- other processes


def _fork(world: World, args: Args) -> Observed:
    world.children[args["child"]] = world.mm.fork(args["child"])
    return _DONE


def _child_write(world: World, args: Args) -> Observed:
    world.child(args["child"]).write(hva(args["space"], args["page"]), _word(int(args["value"], 16)))
    return _DONE


def _child_remote_write(world: World, args: Args) -> Observed:
    # It is the child's call; what is recorded of it is that it worked.
    written = world.mm.process_vm_writev(hva(args["space"], args["page"]), _word(int(args["value"], 16)))
    return _DONE if written == 8 else {"rc": written}


def _child_exit(world: World, args: Args) -> Observed:
    world.child(args["child"]).exit()
    return _DONE


# ---- system


def _swapon(world: World, args: Args) -> Observed:
    method(world.mm, "swapon", "swapon")(args["pages"])
    return _DONE


def _swapoff(world: World, args: Args) -> Observed:
    method(world.mm, "swapoff", "swapoff")()
    return _DONE


def _hugetlb_reserve(world: World, args: Args) -> Observed:
    method(world.host, "reserve_huge_pages", "hugetlb_reserve")(args["pages"])
    return _DONE


def _ksm_scan(world: World, args: Args) -> Observed:
    method(world.mm, "ksm_scan", "ksm_scan")(until_sharing=args["until"]["pages_sharing"])
    return _DONE


def _memcg_enter(world: World, args: Args) -> Observed:
    method(world.mm, "memcg_enter", "memcg_enter")()
    return _DONE


def _memcg_reclaim(world: World, args: Args) -> Observed:
    method(world.mm, "memcg_reclaim", "memcg_reclaim")(args["max_passes"])
    return _DONE


def _compact_memory(world: World, args: Args) -> Observed:
    compact_memory(world.host, world.trace)
    return _DONE


def _wait_damon(world: World, args: Args) -> Observed:
    raise UnsupportedError("wait_damon")


# ---- userfaultfd


def _monitor(world: World, answers: Args) -> userfaultfd.Handler:
    """Notes every message and does what the scenario says."""
    content = _word(int(answers.get("value", "0x0"), 16)).ljust(PAGE_SIZE, b"\0")

    def answer(uffd: userfaultfd.Userfaultfd, message: uffd_message.UffdMsg) -> None:
        flags = [name for name, flag in _UFFD_FLAGS.items() if message.flags & flag]
        base = max(base for base in BASE.values() if base <= message.address)
        page = (message.address - base) >> PAGE_SHIFT
        world.messages.append({"page": page, "flags": flags})
        if "wp" in flags and "wp" in answers:
            uffd.writeprotect(message.address, PAGE_SIZE, 0)
        elif "minor" in flags and "minor" in answers:
            uffd.continue_(message.address, PAGE_SIZE)
        elif answers.get("missing") == "zeropage":
            uffd.zeropage(message.address, PAGE_SIZE)
        elif answers.get("missing") == "copy":
            uffd.copy(message.address, content)

    return answer


def _uffd_open(world: World, args: Args) -> Observed:
    features = sum(_UFFD_FEATURES[name] for name in args.get("features", []))
    world.uffd = world.mm.userfaultfd(_monitor(world, args["handler"]), features)
    return _DONE


def _uffd_register(world: World, args: Args) -> Observed:
    _uffd(world).register(*_range(args), _UFFD_MODES[args["mode"]])
    return _DONE


def _uffd_unregister(world: World, args: Args) -> Observed:
    _uffd(world).unregister(*_range(args))
    return _DONE


def _uffd_writeprotect(world: World, args: Args) -> Observed:
    mode = userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP if args["on"] else 0
    _uffd(world).writeprotect(*_range(args), mode)
    return _DONE


def _uffd_move(world: World, args: Args) -> Observed:
    source, length = _range(args)
    to = args["to"]
    moved = _uffd(world).move(hva(to["space"], to["page"]), source, length)
    return _DONE if moved == length else {"rc": -1, "errno": "EAGAIN"}


def _uffd(world: World) -> userfaultfd.Userfaultfd:
    if world.uffd is None:
        raise MmError(errno.EBADF, "there is no userfaultfd: opening it failed")
    return world.uffd


# ---- VM and guest


def _vm_create(world: World, args: Args) -> Observed:
    world.vms[args["vm"]] = Vm(world, args["vm"], 2 if args["guest_pages"] == "2m" else 1)
    return _DONE


def _vm(world: World, args: Args) -> Vm:
    return world.vm(args.get("vm", "vm1"))


def _vm_close(world: World, args: Args) -> Observed:
    _vm(world, args).close()
    return _DONE


def _slot_flags(args: Args) -> int:
    return sum(_SLOT_FLAGS[flag] for flag in args["flags"])


def _memslot_set(world: World, args: Args) -> Observed:
    _vm(world, args).kvm.set_memslot(
        args["slot"], args["gfn"], args["pages"], hva(args["space"], args["page"]), _slot_flags(args)
    )
    return _DONE


def _memslot_delete(world: World, args: Args) -> Observed:
    _vm(world, args).kvm.delete_memslot(args["slot"])
    return _DONE


def _change_memslot(world: World, args: Args, gfn: int | None, flags: int | None) -> Observed:
    kvm = _vm(world, args).kvm
    slot = kvm.memslots.get(args["slot"])
    if slot is None:
        raise MmError(errno.EINVAL, f"memslot {args['slot']}: there is none to change")
    kvm.set_memslot(
        slot.id, slot.gfn if gfn is None else gfn, slot.pages, slot.hva, slot.flags if flags is None else flags
    )
    return _DONE


def _memslot_move(world: World, args: Args) -> Observed:
    return _change_memslot(world, args, args["gfn"], None)


def _memslot_flags(world: World, args: Args) -> Observed:
    return _change_memslot(world, args, None, _slot_flags(args))


def _get_dirty_log(world: World, args: Args) -> Observed:
    log = _vm(world, args).kvm.get_dirty_log(args["slot"])
    return {"rc": 0, "dirty": [page for page in range(len(log) * 8) if log[page >> 3] >> (page & 7) & 1]}


def _seen(vcpu: Vcpu, access: Access) -> Observed:
    """What a guest access shows; ``faulted`` covers all of the step."""
    seen: Observed = {"exit": access.exit, "faulted": bool(vcpu.faults)}
    if access.value is not None:
        seen["value"] = hex(access.value)
    return seen


def _guest_read(world: World, args: Args) -> Observed:
    vcpu = _vm(world, args).vcpu
    span = args.get("range", {"start": args.get("gfn", 0), "end": args.get("gfn", 0) + 1})
    access = Access("ok")
    for gfn in range(span["start"], span["end"], span.get("step", 1)):
        access = vcpu.load(gfn)
        if access.exit != "ok":
            break
    return _seen(vcpu, access)


def _guest_write(world: World, args: Args) -> Observed:
    vcpu = _vm(world, args).vcpu
    access = Access("ok")
    for gfn, value in _values(args, "gfn"):
        access = vcpu.store(gfn, value)
        if access.exit != "ok":
            break
    return _seen(vcpu, access)


# ---- the vCPU beside the host


class _Spin:
    """Loads one page as long as it holds a value."""

    def __init__(self, vcpu: Vcpu, gfn: int, value: int) -> None:
        self.vcpu = vcpu
        self.gfn = gfn
        self.value = value
        self.last = Access("again")

    def __call__(self) -> None:
        if self.running:
            access = self.vcpu.attempt(self.gfn, None)
            if access.exit != "again":
                self.last = access

    @property
    def running(self) -> bool:
        return self.last.exit == "again" or self.last == Access("ok", self.value)


def _guest_spin_start(world: World, args: Args) -> Observed:
    world.background = spin = _Spin(_vm(world, args).vcpu, args["gfn"], int(args["while"], 16))
    spin()
    return {}


def _guest_spin_end(world: World, args: Args) -> Observed:
    spin, world.background = world.background, None
    if not isinstance(spin, _Spin):
        raise MmError(errno.EINVAL, "guest_spin_end: the vCPU does not spin")
    for _ in range(_SPIN_LIMIT):
        if not spin.running:
            break
        spin()
    last = spin.last
    return {
        "exit": "endless" if spin.running else last.exit,
        **({} if last.value is None else {"value": hex(last.value)}),
    }


def _guest_loop_start(world: World, args: Args) -> Observed:
    vcpu = _vm(world, args).vcpu
    stores = list(fill_values(args["fill"]))
    at = 0

    def run() -> None:
        nonlocal at
        gfn, value = stores[at]
        if vcpu.attempt(gfn, value).exit == "ok":
            at = (at + 1) % len(stores)

    world.background = run
    return {}


def _guest_loop_stop(world: World, args: Args) -> Observed:
    world.background = None
    return {}


STEPS: Final[dict[str, Callable[[World, Args], Observed]]] = {
    "mmap": _mmap,
    "munmap": _munmap,
    "mremap": _mremap,
    "mremap_each": _mremap_each,
    "mprotect": _mprotect,
    "madvise": _madvise,
    "madvise_loop": _madvise_loop,
    "mlock": _mlock,
    "munlock": _munlock,
    "msync": _msync,
    "clear_refs": _clear_refs,
    "host_read": _host_read,
    "host_write": _host_write,
    "host_check": _host_check,
    "proc_mem_write": _proc_mem_write,
    "direct_read_into": _direct_read_into,
    "pagemap_scan": _pagemap_scan,
    "numa_move": _numa_move,
    "exit": _exit,
    "file_create": _file_create,
    "ftruncate": _ftruncate,
    "fallocate": _fallocate,
    "pwrite": _pwrite,
    "pread": _pread,
    "fsync": _fsync,
    "fadvise": _fadvise,
    "fork": _fork,
    "child_write": _child_write,
    "child_remote_write": _child_remote_write,
    "child_exit": _child_exit,
    "swapon": _swapon,
    "swapoff": _swapoff,
    "hugetlb_reserve": _hugetlb_reserve,
    "ksm_scan": _ksm_scan,
    "memcg_enter": _memcg_enter,
    "memcg_reclaim": _memcg_reclaim,
    "compact_memory": _compact_memory,
    "wait_damon": _wait_damon,
    "uffd_open": _uffd_open,
    "uffd_register": _uffd_register,
    "uffd_unregister": _uffd_unregister,
    "uffd_writeprotect": _uffd_writeprotect,
    "uffd_move": _uffd_move,
    "vm_create": _vm_create,
    "vm_close": _vm_close,
    "memslot_set": _memslot_set,
    "memslot_delete": _memslot_delete,
    "memslot_move": _memslot_move,
    "memslot_flags": _memslot_flags,
    "get_dirty_log": _get_dirty_log,
    "guest_read": _guest_read,
    "guest_write": _guest_write,
    "guest_spin_start": _guest_spin_start,
    "guest_spin_end": _guest_spin_end,
    "guest_loop_start": _guest_loop_start,
    "guest_loop_stop": _guest_loop_stop,
}
