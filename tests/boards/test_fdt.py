"""The DTB writer against a reader written from the specification, and against dtc."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xipvm.boards.fdt import Fdt, Node

Tree = tuple[str, dict[str, bytes], list[Any]]


def parse(dtb: bytes) -> Tree:
    """(name, properties, children) of the root node; checks the header and the block bounds on the way."""
    magic, total, struct_at, strings_at, reserve_at, version, last, _, strings_size, struct_size = struct.unpack_from(
        ">10I", dtb
    )
    assert (magic, version, last, total) == (0xD00DFEED, 17, 16, len(dtb))
    assert reserve_at % 8 == 0
    assert struct_at % 4 == 0
    assert reserve_at < struct_at
    assert struct_at + struct_size <= strings_at
    assert strings_at + strings_size == total
    at = struct_at

    def word() -> int:
        nonlocal at
        (value,) = struct.unpack_from(">I", dtb, at)
        at += 4
        return int(value)

    def node() -> Tree:
        nonlocal at
        end = dtb.index(b"\0", at)
        name = dtb[at:end].decode()
        at = (end + 4) & ~3
        properties: dict[str, bytes] = {}
        children: list[Tree] = []
        while (token := word()) != 2:
            if token == 1:
                children.append(node())
                continue
            assert token == 3
            assert not children, "properties come before child nodes"
            length, name_at = word(), strings_at + word()
            properties[dtb[name_at : dtb.index(b"\0", name_at)].decode()] = dtb[at : at + length]
            at = (at + length + 3) & ~3
        return name, properties, children

    assert word() == 1
    root = node()
    assert word() == 9
    assert at == struct_at + struct_size
    return root


names = st.text("abcxyz,-@0123456789", min_size=1, max_size=8)
trees = st.recursive(
    st.tuples(st.dictionaries(names, st.binary(max_size=9), max_size=4), st.just({})),
    lambda inner: st.tuples(
        st.dictionaries(names, st.binary(max_size=9), max_size=4), st.dictionaries(names, inner, max_size=3)
    ),
    max_leaves=8,
)


def plant(node: Node, tree: tuple[dict[str, bytes], dict[str, Any]]) -> None:
    for name, value in tree[0].items():
        node.data(name, value)
    for name, below in tree[1].items():
        plant(node.child(name), below)


def expect(name: str, tree: tuple[dict[str, bytes], dict[str, Any]]) -> Tree:
    return name, tree[0], [expect(child, below) for child, below in tree[1].items()]


@settings(deadline=None, derandomize=True)
@given(trees)
def test_any_tree_comes_back(tree: tuple[dict[str, bytes], dict[str, Any]]) -> None:
    fdt = Fdt()
    plant(fdt.root, tree)
    assert parse(fdt.to_bytes()) == expect("", tree)


def test_property_kinds() -> None:
    fdt = Fdt()
    node = fdt.root.child("n").cells("c", 1, 0xFFFF_FFFF).quads("q", 1 << 40).strings("s", "a", "bc").flag("f")
    assert node.phandle() == node.phandle() == 1
    assert fdt.root.child("m").phandle() == 2
    _, _, children = parse(fdt.to_bytes())
    assert children[0][1] == {
        "c": bytes.fromhex("00000001ffffffff"),
        "q": bytes.fromhex("0000010000000000"),
        "s": b"a\0bc\0",
        "f": b"",
        "phandle": b"\0\0\0\1",
    }


def test_bad_trees_are_refused() -> None:
    root = Fdt().root
    root.child("twice")
    with pytest.raises(ValueError, match="child twice already"):
        root.child("twice")
    with pytest.raises(ValueError, match="node name"):
        root.child("a/b")
    with pytest.raises(ValueError, match="property name"):
        root.flag("")
    with pytest.raises(struct.error):
        root.cells("c", 1 << 32)


def test_dtc_reads_it(tmp_path: Path) -> None:
    dtc = shutil.which("dtc")
    if dtc is None:
        pytest.skip("dtc is missing: apt-get install device-tree-compiler")
    fdt = Fdt()
    fdt.reserved.append((0x4000_0000, 0x1000))
    fdt.root.strings("compatible", "a,b").child("soc").cells("reg", 1, 2)
    path = tmp_path / "t.dtb"
    path.write_bytes(fdt.to_bytes())
    done = subprocess.run([dtc, "-I", "dtb", "-O", "dts", str(path)], capture_output=True, text=True, check=True)
    assert "/memreserve/\t0x0000000040000000 0x0000000000001000;" in done.stdout
    assert 'compatible = "a,b";' in done.stdout
    assert "reg = <0x01 0x02>;" in done.stdout
