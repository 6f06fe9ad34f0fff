"""Debian's U-Boot, as it comes: it boots in place from flash and keeps its environment there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.run.command import UBOOT, Outcome, needs_uboot, xipvm
from xipvm import Event, TraceReader, boards

pytestmark = needs_uboot

BOARD = boards.get("virt-arm64")
DEVICE_PFN = 1 << 24
"""Frames from here on are no host RAM."""


def session(directory: Path, *commands: str, options: tuple[object, ...] = (), guest: bool = True) -> Outcome:
    """U-Boot with these commands typed at its prompt. The first line stops autoboot."""
    script = directory / "script"
    script.write_text("\n" + "".join(f"{command}\n" for command in commands))
    what = (UBOOT,) if guest else ("--board", BOARD.name)
    return xipvm("run", *what, "--input", script, "--until", "=> ", *options)


def answers(outcome: Outcome, command: str) -> list[str]:
    """What U-Boot printed for ``command``, which is the last one."""
    assert outcome.status == 0, outcome
    assert outcome.lines[-1] == "=> "
    return outcome.lines[outcome.lines.index(f"=> {command}") + 1 : -1]


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[Event]]:
    """One boot to the prompt and ``version`` there, with what its trace has."""
    directory = tmp_path_factory.mktemp("boot")
    outcome = session(directory, "version", options=("--trace", directory / "t"))
    with TraceReader(directory / "t") as reader:
        return outcome, list(reader)


@pytest.fixture
def environment_image(tmp_path: Path) -> Iterator[Path]:
    """An image of flash bank 1, in which U-Boot has its environment, with ``colour=red`` saved in it."""
    image = tmp_path / "env.img"
    assert xipvm("flash", "create", image, "--board", BOARD.name, "--bank", 1).status == 0
    saved = session(tmp_path, "setenv colour red", "saveenv", options=("--flash", f"{image},bank=1"))
    assert answers(saved, "saveenv")[-1] == "OK"
    yield image
    image.unlink()


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_boots_to_its_prompt(booted: tuple[Outcome, list[Event]]) -> None:
    outcome, _ = booted
    assert "DRAM:  128 MiB" in outcome.lines
    assert "Flash: 64 MiB" in outcome.lines
    banner = next(line for line in outcome.lines if line.startswith("U-Boot 20"))
    assert banner in answers(outcome, "version")
    assert outcome.err.startswith("xipvm: the awaited text came, status 0\n")


def test_executes_from_the_flash_itself(booted: tuple[Outcome, list[Event]]) -> None:
    _, events = booted
    start = next(index for index, event in enumerate(events) if event.kind == "machine_start")
    first = next(event for event in events if event.kind == "tlb_insert")
    bank = first.fields["pfn"]
    assert (first.fields["gfn"], first.fields["rights"]) == (0, "rx")
    assert bank >= DEVICE_PFN
    pages = BOARD.flash[0].size >> 12
    executed = set()
    for event in events:
        if event.kind == "tlb_insert" and event.fields["gfn"] < pages:
            assert event.fields["pfn"] == bank + event.fields["gfn"], "the guest sees the bank's own frames"
            if "x" in event.fields["rights"]:
                executed.add(event.fields["gfn"])
    assert len(executed) > 20
    # Before it runs, only the pages that hold the device tree are given memory: nothing of the flash is copied.
    ready = [event for event in events[:start] if event.kind == "page_alloc"]
    assert 1 <= len(ready) <= 4
    relocated = next(
        index
        for index, event in enumerate(events)
        if event.kind == "tlb_insert" and "x" in event.fields["rights"] and event.fields["gfn"] >= pages
    )
    in_place = {e.fields["gfn"] for e in events[:relocated] if e.kind == "tlb_insert" and e.fields["rights"] == "rx"}
    assert len(in_place) > 20, "much of it ran before it moved itself to RAM"


def test_inspect_puts_all_of_it_into_flash() -> None:
    outcome = xipvm("inspect", UBOOT, "--json")
    pieces = json.loads(outcome.out)["pieces"]
    assert {piece["where"] for piece in pieces} == {"flash0"}
    assert pieces[0]["address"] == 0


def test_the_environment_survives_in_an_image_of_all_flash(tmp_path: Path) -> None:
    image = tmp_path / "flash.img"
    assert xipvm("flash", "create", image, "--board", BOARD.name).status == 0
    flash = ("--flash", image)
    saved = session(tmp_path, "setenv colour red", "saveenv", options=flash)
    assert answers(saved, "saveenv")[-1] == "OK"
    assert "bad CRC" in saved.out
    shown = session(tmp_path, "printenv colour", options=flash)
    assert answers(shown, "printenv colour") == ["colour=red"]
    assert "bad CRC" not in shown.out
    alone = session(tmp_path, "printenv colour", options=flash, guest=False)
    assert alone.out == shown.out, "the image has U-Boot itself, too"
    image.unlink()


def test_a_snapshot_is_written_and_forgotten(tmp_path: Path, environment_image: Path) -> None:
    before = digest(environment_image)
    snapshot = ("--flash", f"{environment_image},bank=1,snapshot=on")
    reset = session(tmp_path, "setenv colour blue", "saveenv", "reset", "", "printenv colour", options=snapshot)
    assert answers(reset, "printenv colour") == ["colour=blue"], "a reset is no power cycle"
    assert digest(environment_image) == before
    assert answers(session(tmp_path, "printenv colour", options=snapshot), "printenv colour") == ["colour=red"]


def test_a_readonly_image_does_not_change(tmp_path: Path, environment_image: Path) -> None:
    before = digest(environment_image)
    trace = tmp_path / "t"
    options = ("--flash", f"{environment_image},bank=1,readonly=on", "--trace", trace)
    saved = session(tmp_path, "setenv colour blue", "saveenv", "reset", "", "printenv colour", options=options)
    # saveenv says OK, on QEMU too: U-Boot's driver waits for the ready bit and does not look at the error bits.
    assert answers(saved, "printenv colour") == ["colour=red"]
    assert digest(environment_image) == before
    assert "0 flash programs, 0 flash erases" in saved.err
    with TraceReader(trace) as reader:
        refused = [event.fields for event in reader if event.kind == "flash_error"]
    assert {fields["bank"] for fields in refused} == {1}
    assert any("erase of a readonly image" in fields["what"] for fields in refused)


@pytest.mark.parametrize("options", [("--clock", "host"), ("--smp", "2"), ("--smp", "2", "--clock", "host")])
def test_other_machines(tmp_path: Path, environment_image: Path, options: tuple[str, ...]) -> None:
    flash = ("--flash", f"{environment_image},bank=1")
    saved = session(tmp_path, "printenv colour", "setenv colour green", "saveenv", options=(*options, *flash))
    assert "colour=red" in saved.lines
    assert answers(saved, "saveenv")[-1] == "OK"
    assert answers(session(tmp_path, "printenv colour", options=flash), "printenv colour") == ["colour=green"]
