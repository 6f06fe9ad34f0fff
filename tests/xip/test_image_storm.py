"""``xipvm storm --image``: guests in an image, and files of it that they store to, compute the same in any storm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.asm import a64, words
from tests.loader.conftest import write_elf
from tests.run.command import guest, inside
from xipvm.address import PAGE_SIZE
from xipvm.image_option import parse_image
from xipvm.machine import Machine
from xipvm.mmu.file import AddressSpace
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.zap import unmap_mapping_range
from xipvm.storm import Storm
from xipvm.storm.check import Job, run_once
from xipvm.trace import Event, Trace

MakeImage = Callable[..., Path]

DATA = 0x6000_0000
PAGES, ROUNDS = 5, 400
IN_PAGE = 0x78
"""Where the only segment of an ELF of ours begins, in the file and in memory."""


def counter() -> bytes:
    """A guest in flash, with no RAM, that adds 1 to the first word of each page at ``DATA``, round after round."""
    page = [
        a64.ldr(7, 5), a64.add(7, 7, 1), a64.str(7, 5),
        a64.add(5, 5, PAGE_SIZE - 1), a64.add(5, 5, 1), a64.sub(6, 6, 1), a64.cbnz(6, -24),
    ]  # fmt: skip
    one = [a64.add(5, 1, 0), a64.movz(6, PAGES), *page]
    end = [*a64.mov(0, 0x8400_0008), a64.hvc(), a64.b(0)]  # SYSTEM_OFF
    code = [*a64.mov(1, DATA), a64.movz(4, ROUNDS), *one, a64.sub(4, 4, 1), a64.cbnz(4, -4 * len(one) - 4), *end]
    return write_elf({"paddr": IN_PAGE, "data": words(*code)}, entry=IN_PAGE)


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    """With the counter, hello, data, and a file that is empty."""
    files = {"/counter": counter(), "/hello": guest("hello", "arm64").read_bytes(), "/empty": b""}
    return make_image({**files, "/boot/data": bytes(range(1, 251)) * 80})


@pytest.mark.parametrize("shared", ["", ",shared=on"])
@pytest.mark.parametrize("protocol", ["modern", "2008"])
@pytest.mark.parametrize("name", ["/counter", "/hello"])
def test_a_guest_in_an_image_is_what_it_was(
    image: Path, fsck: Callable[[Path], str], name: str, protocol: str, shared: str
) -> None:
    before = image.read_bytes()
    options = ("--image", image, "--map", f"/boot/data@{DATA:#x}{shared}", "--protocol", protocol)
    done = inside("storm", *options, "--seeds", 4, "--rate", 3000, "--ops", "all+devices", name, cwd=image.parent)
    assert (done.status, done.err.count("\n")) == (0, 1), done
    assert done.lines[-1].startswith("4 seeds, 0 differ; ")
    assert image.read_bytes() == before
    assert fsck(image) == ""


def test_what_the_guest_stored_in_a_file_is_compared(image: Path) -> None:
    outcome = run_once(Job("/counter", image=parse_image(str(image)), map_files=(f"/boot/data@{DATA:#x},shared=on",)))
    first = int.from_bytes(bytes(range(1, 9)), "little")
    assert outcome.reason == "exit"
    assert int.from_bytes(outcome.files[DATA][:8], "little") == first + ROUNDS
    assert len([gpa for gpa in outcome.files if gpa >= DATA]) == PAGES


def test_a_guest_that_is_not_told_shows_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--image", image, "--map", f"/boot/data@{DATA:#x}", "--rate", 20000, "--ops", "migrate+pageout+rewrite")
    monkeypatch.setattr(Kvm, "_zap", lambda self, start, end: None)
    found = inside("storm", *options, "--seeds", 3, "/counter", cwd=image.parent)
    assert found.status == 1
    (replay,) = (line for line in found.lines if line.startswith("replay: "))
    assert f"--image {image},snapshot=on --map /boot/data@{DATA:#x} /counter" in replay


def test_private_copies_that_get_lost_are_noticed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storm that unmaps as truncation does, and not only what is in place."""

    def unmap(file: AddressSpace, pgoff: int, count: int, *, even_cows: bool) -> None:
        unmap_mapping_range(file, pgoff, count)

    options = ("--image", image, "--map", f"/boot/data@{DATA:#x}", "--rate", 2000, "--ops", "flash")
    assert inside("storm", *options, "--seeds", 3, "/counter", cwd=image.parent).status == 0
    monkeypatch.setattr("xipvm.storm.operations.unmap_mapping_range", unmap)
    found = inside("storm", *options, "--seeds", 3, "/counter", cwd=image.parent)
    assert found.status == 1
    assert "what is mapped of the image differs in " in found.lines[0]


@pytest.mark.parametrize("shared", [True, False])
def test_all_that_is_used_in_place_is_unmapped_and_comes_back(image: Path, shared: bool) -> None:
    """The flash operation takes pages of the guest's own file and of the one beside it."""
    gone: list[range] = []

    def watch(event: Event) -> None:
        if event.kind == "spte_zap":
            gone.append(range(event.fields["start"], event.fields["end"]))

    trace = Trace()
    trace.attach(watch)
    files = [f"/boot/data@{DATA:#x}{',shared=on' if shared else ''}"]
    storm = Storm(3, rate=2000, ops=["flash"])
    with Machine("/counter", image=str(image), map_files=files, storm=storm, trace=trace) as machine:
        assert machine.run().status == 0
    assert all(any(page in pages for pages in gone) for page in (0, DATA // PAGE_SIZE))


@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_a_sparse_file_that_is_shared_gets_its_blocks_from_the_guest_alone(image: Path, protocol: str) -> None:
    """Others could leave none for the guest."""
    assert inside("xip", "truncate", image, "/empty", "1M", cwd=image.parent).status == 0
    allocated: dict[str, int] = Counter()

    def watch(event: Event) -> None:
        if event.kind == "xip_allocate":
            allocated[event.actor] += 1

    trace = Trace()
    trace.attach(watch)
    storm = Storm(3, rate=20000, ops=["populate", "rewrite", "mlock", "thread", "flash"])
    files = [f"/empty@{DATA:#x},shared=on"]
    with Machine("/counter", image=str(image), map_files=files, storm=storm, trace=trace, protocol=protocol) as machine:
        assert machine.run().status == 0
    assert allocated == {"vcpu0": PAGES}


def test_slots_that_are_moved_out_of_the_way_at_once(image: Path) -> None:
    """Of two memslots that storms inside each other move to one place, the second stays where it is."""
    words = ("--rate", 100000, "--seeds", 4, "--ops", "memslot+range")
    options = ("--image", image, "--map", f"/boot/data@{DATA:#x}", *words)
    assert inside("storm", *options, "/counter", cwd=image.parent).status == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--map", "/data@0x60000000", "/counter"), "none is named"),
        (("--image", "fs.ext2", "--map", "/data", "/counter"), "write PATH@ADDRESS"),
        (("--image", "fs.ext2", "/nope"), "/nope: ENOENT"),
        (("--image", "nothing.ext2", "/counter"), "nothing.ext2: No such file or directory"),
    ],
)
def test_mistakes_are_named(image: Path, words: tuple[str, ...], complaint: str) -> None:
    done = inside("storm", *words, cwd=image.parent)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert complaint in done.err
