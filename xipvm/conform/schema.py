"""What the fields of a scenario may hold: the table of ops with their arguments, of ``expect`` and of ``detail``.

A check is a function that says whether a value will do. A field whose name ends in ``?`` may be left out; one that no
table names is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

FORMAT: Final = 1
SPACES: Final = ("slot", "alt")
"""The stretches of addresses that steps name."""
LIMIT: Final = 1 << 24
"""Page numbers and counts are below it."""
FILE_LIMIT: Final = 1 << 16
"""Files have at most so many pages: their contents are made in memory."""

Check = Callable[[Any], bool]


class WrongError(ValueError):
    """Why something is no scenario."""


def brief(value: Any) -> str:
    """A value for a message: text as it is, all else as JSON."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LIMIT


def _positive(value: Any) -> bool:
    return _integer(value) and value > 0


def _signed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _file_pages(value: Any) -> bool:
    """The size of a file, which may be in the middle of a page."""
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= FILE_LIMIT


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _matches(pattern: str) -> Check:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _one_of(*allowed: Any) -> Check:
    return lambda value: any(value == other and type(value) is type(other) for other in allowed)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _record(**checks: Check) -> Check:
    """An object with these fields; a name that ends in ``_`` is optional, and stands without it."""
    spec = {name.rstrip("_") + ("?" if name.endswith("_") else ""): check for name, check in checks.items()}

    def check(value: Any) -> bool:
        try:
            check_fields("", value, spec)
        except WrongError:
            return False
        return True

    return check


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def check_fields(what: str, value: Any, spec: Mapping[str, Check]) -> None:
    """``value`` is an object with the fields of ``spec``; those whose name ends in ``?`` may be missing.

    Raises WrongError, which calls it ``what``.
    """
    if not isinstance(value, dict):
        raise WrongError(f"{what} is no object")
    for name in value:
        if name not in spec and f"{name}?" not in spec:
            raise WrongError(f"{what} has an unknown field {name!r}")
    for name, check in spec.items():
        plain = name.removesuffix("?")
        if plain not in value:
            if plain == name:
                raise WrongError(f"{what} lacks {name!r}")
        elif not check(value[plain]):
            raise WrongError(f"{what}: {plain} cannot be {brief(value[plain])[:60]}")


_hex = _matches(r"0x[0-9a-f]{1,16}")
_frame = _matches(r"zero|hugezero|none|swap|guard|[fna]\d+|c\d+(\.\d+)?")
_space = _one_of(*SPACES)
_place = _record(space=_space, page=_integer)
_range_fields = _record(start=_integer, end=_integer, step_=_integer)
_fill = _either(
    _record(start=_integer, end=_integer, value=_hex),
    _record(start=_integer, end=_integer, base=_hex, step_=_hex),
)
_prot = _one_of("", "r", "rw", "rwx")
_advice = _one_of(
    *("DONTNEED", "FREE", "COLD", "PAGEOUT", "REMOVE", "GUARD_INSTALL", "GUARD_REMOVE", "POPULATE_WRITE", "DONTFORK"),
    *("HUGEPAGE", "NOHUGEPAGE", "COLLAPSE", "MERGEABLE", "UNMERGEABLE"),
)
_slot_flags = _list_of(_one_of("READONLY", "LOG_DIRTY_PAGES"))
_handler = _record(
    wp_=_one_of("unprotect"), missing_=_one_of("copy", "zeropage"), minor_=_one_of("continue"), value_=_hex
)

TOP: Final[dict[str, Check]] = {
    "format": _one_of(FORMAT),
    "scenario": _text,
    "group": _text,
    "title": _text,
    "recorded": _record(kernel=_text, secondary=_text),
    "caveats?": _list_of(_text),
    "stable?": _list_of(_text),
    "steps": lambda value: isinstance(value, list) and bool(value),
}
_RANGE: Final[dict[str, Check]] = {"space": _space, "start": _integer, "end": _integer}
_PAGE: Final[dict[str, Check]] = {"space": _space, "page": _integer}
_WORD: Final[dict[str, Check]] = {**_PAGE, "value": _hex}
_SLOT: Final[dict[str, Check]] = {"vm": _text, "slot": _integer}

OPS: Final[dict[str, dict[str, Check]]] = {
    "mmap": {
        **_PAGE,
        "pages": _integer,
        "kind": _one_of("anon", "file", "hugetlb"),
        "share": _one_of("private", "shared"),
        "prot": _prot,
        "file?": _text,
        "file_page?": _integer,
        "fixed?": _flag,
    },
    "munmap": _RANGE,
    "mremap": {
        **_RANGE,
        "new_pages": _integer,
        "flags": _list_of(_one_of("MAYMOVE", "FIXED", "DONTUNMAP")),
        "to?": _place,
    },
    "mprotect": {**_RANGE, "prot": _prot},
    "madvise": {**_RANGE, "advice": _advice},
    "mlock": _RANGE,
    "munlock": _RANGE,
    "msync": {**_RANGE, "mode": _one_of("sync", "async")},
    "clear_refs": {"mode": _one_of(1, 4)},
    "host_read": _PAGE,
    "host_write": {
        "space": _space,
        "page?": _integer,
        "value?": _hex,
        "fill?": _fill,
        "offset?": _integer,
        "bytes?": _one_of(1, 2, 4, 8),
    },
    "proc_mem_write": _WORD,
    "direct_read_into": _WORD,
    "pagemap_scan": {**_RANGE, "category": _one_of("written"), "write_protect": _flag},
    "numa_move": {**_RANGE, "via": _one_of("move_pages", "mbind"), "node": _integer},
    "exit": {},
    "file_create": {
        "file": _text,
        "fs": _one_of("shmem", "ext4"),
        "pages": _file_pages,
        "contents": _either(_fill, _one_of(None)),
        "page_cache": _one_of("none", "clean", "dirty"),
    },
    "ftruncate": {"file": _text, "pages": _file_pages},
    "fallocate": {"file": _text, "mode": _one_of("punch_hole"), "start": _integer, "end": _integer},
    "pwrite": {"file": _text, "page": _integer, "value": _hex, "direct": _flag},
    "pread": {"file": _text, "page": _integer},
    "fsync": {"file": _text},
    "fadvise": {"file": _text, "advice": _one_of("DONTNEED")},
    "fork": {"child": _text},
    "child_write": {"child": _text, **_WORD},
    "child_remote_write": {"child": _text, **_WORD},
    "child_exit": {"child": _text},
    "swapon": {"pages": _integer},
    "swapoff": {},
    "hugetlb_reserve": {"pages": _integer},
    "ksm_scan": {
        "knobs": _record(sleep_millisecs=_integer, pages_to_scan=_integer),
        "until": _record(pages_sharing=_integer),
    },
    "memcg_enter": {},
    "memcg_reclaim": {"max_passes": _integer},
    "uffd_open": {"handler": _handler, "features?": _list_of(_one_of("WP_ASYNC", "WP_UNPOPULATED"))},
    "uffd_register": {**_RANGE, "mode": _one_of("WP", "MISSING", "MINOR")},
    "uffd_unregister": _RANGE,
    "uffd_writeprotect": {**_RANGE, "on": _flag},
    "uffd_move": {**_RANGE, "to": _place},
    "vm_create": {"vm": _text, "guest_pages": _one_of("4k", "2m")},
    "vm_close": {"vm": _text},
    "memslot_set": {**_SLOT, "gfn": _integer, "pages": _integer, **_PAGE, "flags": _slot_flags},
    "memslot_delete": _SLOT,
    "memslot_move": {**_SLOT, "gfn": _integer},
    "memslot_flags": {**_SLOT, "flags": _slot_flags},
    "get_dirty_log": _SLOT,
    "guest_read": {"gfn?": _integer, "range?": _range_fields, "vm?": _text},
    "guest_write": {"gfn?": _integer, "value?": _hex, "fill?": _fill, "vm?": _text},
    # Where the vCPU runs beside the host.
    "guest_spin_start": {"gfn": _integer, "while": _hex},
    "guest_spin_end": {},
    "guest_loop_start": {"fill": _fill},
    "guest_loop_stop": {},
    "madvise_loop": {**_RANGE, "advice": _advice, "milliseconds": _integer},
    "host_check": {"space": _space, "range": _range_fields, "value": _hex},
    "mremap_each": {"space": _space, "stride": _integer, "count": _integer, "to": _place},
    "compact_memory": {"node": _integer},
    "wait_damon": {"seconds": _integer},
}

_call_name = _one_of("invalidate_range_start", "clear_flush_young", "clear_young", "test_young", "release")
_event = _one_of("UNMAP", "CLEAR", "PROTECTION_VMA", "PROTECTION_PAGE", "SOFT_DIRTY")
_call = _either(
    _record(call=_one_of("release")),
    _record(call=_call_name, event_=_event, space=_one_of("mm"), site_=_text, by_=_text),
    _record(call=_call_name, event_=_event, space=_space, start=_integer, end=_integer, site_=_text, by_=_text),
)


_repeat = _record(
    repeat=_record(
        **{"from": _integer, "to": _integer, "step": _positive, "pages": _positive, "call": _call_name},
        event_=_event,
        space=_space,
        site_=_text,
        by_=_text,
    )
)


def _changes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and isinstance(pair, list) and len(pair) == 2 and all(map(_frame, pair))
        for key, pair in value.items()
    )


_page_key = _matches(r"\d+")
_perm = _one_of("r", "rw")
_level = _one_of(1, 2)
EXPECT: Final[dict[str, Check]] = {
    "rc?": _signed,
    "errno?": _either(_text, _signed),
    "exit?": _one_of("ok", "efault", "mmio"),
    "value?": _hex,
    "signal?": _text,
    "faulted?": _flag,
    "spte?": _record(
        perm=_perm,
        level=_level,
        frame=_frame,
        frame_is=_one_of("same", "new", "cache", "zero", "hugezero", "swapin"),
    ),
    "primary?": _changes,
    "primary_ignore?": _list_of(_page_key),
    "notifier?": _list_of(_either(_call, _repeat)),
    "notifier_order?": _one_of("exact", "overlap"),
    "uffd?": _list_of(_record(page=_integer, flags=_list_of(_one_of("write", "wp", "minor")))),
    "dirty?": _list_of(_integer),
    "written?": _list_of(lambda pair: isinstance(pair, list) and len(pair) == 2 and all(map(_integer, pair))),
    "wrong?": _integer,
}
_delta = _record(**{"4k_": _signed, "2m_": _signed})
DETAIL: Final[dict[str, Check]] = {
    "faults?": _integer,
    "fault_access?": _list_of(_matches(r"(P\+)?(W\+)?U")),
    "because?": _one_of("prefetched", "fault-around"),
    "faulted?": _flag,
    "value?": _hex,
    "primary?": _changes,
    "prefetched?": _list_of(_record(gfn=_integer, perm=_perm, frame=_frame, level=_level)),
    "primary_around?": _changes,
    "spte_delta?": _delta,
    "flush_requests?": _integer,
    "kicks?": _integer,
    "passes?": _integer,
    "order?": _list_of(_either(_text, _record(times=_integer, of=lambda value: isinstance(value, list)))),
}
