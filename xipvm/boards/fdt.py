"""Flattened device trees: a writer of the DTB format, version 17 (Devicetree Specification 0.4, chapter 5).

Build a tree of ``Node``s and take ``Fdt.to_bytes``. The same tree gives the same bytes. Phandles are given
out on demand, ascending from 1, and stand in the tree as ordinary properties.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAGIC = 0xD00DFEED
VERSION = 17
LAST_COMPATIBLE_VERSION = 16
BEGIN_NODE = 1
END_NODE = 2
PROP = 3
END = 9
_HEADER = struct.Struct(">10I")
_NAME_CHARS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,._+-@#?")


class Node:
    """A node: properties in the order they were set, and children in the order they were made.

    The setters return the node, so that they chain; setting a property again replaces it.
    """

    def __init__(self, fdt: Fdt, name: str) -> None:
        if not set(name) <= _NAME_CHARS:
            raise ValueError(f"{name!r} is not a node name")
        self.name = name
        self.properties: dict[str, bytes] = {}
        self.children: list[Node] = []
        self._fdt = fdt

    def child(self, name: str) -> Node:
        """A new child node. Raises ValueError when the name is taken."""
        if any(child.name == name for child in self.children):
            raise ValueError(f"{self.name or '/'} has a child {name} already")
        node = Node(self._fdt, name)
        self.children.append(node)
        return node

    def data(self, name: str, value: bytes) -> Node:
        """A property of raw bytes."""
        if not name or not set(name) <= _NAME_CHARS:
            raise ValueError(f"{name!r} is not a property name")
        self.properties[name] = value
        return self

    def flag(self, name: str) -> Node:
        """An empty property: its presence is what it says."""
        return self.data(name, b"")

    def cells(self, name: str, *values: int) -> Node:
        """A property of 32-bit cells."""
        return self.data(name, struct.pack(f">{len(values)}I", *values))

    def quads(self, name: str, *values: int) -> Node:
        """A property of 64-bit numbers, two cells each (``reg`` under ``#address-cells = #size-cells = 2``)."""
        return self.data(name, struct.pack(f">{len(values)}Q", *values))

    def strings(self, name: str, *values: str) -> Node:
        """A property of one or more strings."""
        return self.data(name, b"".join(value.encode() + b"\0" for value in values))

    def phandle(self) -> int:
        """The number by which other nodes refer to this one; given out at the first call."""
        value = self.properties.get("phandle")
        if value is None:
            self.cells("phandle", self._fdt.new_phandle())
            value = self.properties["phandle"]
        return int.from_bytes(value, "big")

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


class Fdt:
    """A device tree; ``root`` is its root node, ``reserved`` the (address, size) pairs to keep off."""

    def __init__(self) -> None:
        self.root = Node(self, "")
        self.reserved: list[tuple[int, int]] = []
        self._phandles = 0

    def new_phandle(self) -> int:
        """The next unused phandle."""
        self._phandles += 1
        return self._phandles

    def to_bytes(self, *, boot_cpu: int = 0) -> bytes:
        """The DTB: header, reservations, structure block, strings block."""
        strings = _Strings()
        structure = bytearray()
        _put_node(structure, strings, self.root)
        structure += struct.pack(">I", END)
        reserved = b"".join(struct.pack(">2Q", *pair) for pair in [*self.reserved, (0, 0)])
        structure_at = _HEADER.size + len(reserved)
        strings_at = structure_at + len(structure)
        header = _HEADER.pack(
            MAGIC,
            strings_at + len(strings.block),
            structure_at,
            strings_at,
            _HEADER.size,
            VERSION,
            LAST_COMPATIBLE_VERSION,
            boot_cpu,
            len(strings.block),
            len(structure),
        )
        return header + reserved + bytes(structure) + bytes(strings.block)


class _Strings:
    """The strings block: each property name once."""

    def __init__(self) -> None:
        self.block = bytearray()
        self._offsets: dict[str, int] = {}

    def offset(self, name: str) -> int:
        if name not in self._offsets:
            self._offsets[name] = len(self.block)
            self.block += name.encode() + b"\0"
        return self._offsets[name]


def _put_node(out: bytearray, strings: _Strings, node: Node) -> None:
    out += struct.pack(">I", BEGIN_NODE) + node.name.encode() + b"\0"
    _align(out)
    for name, value in node.properties.items():
        out += struct.pack(">3I", PROP, len(value), strings.offset(name)) + value
        _align(out)
    for child in node.children:
        _put_node(out, strings, child)
    out += struct.pack(">I", END_NODE)


def _align(out: bytearray) -> None:
    out += bytes(-len(out) % 4)
