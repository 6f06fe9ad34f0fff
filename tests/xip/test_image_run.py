"""Guests that run out of an image, and files of it that are guest memory, from the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GUESTS = Path(__file__).parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")

MakeImage = Callable[..., Path]


def xipvm(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xipvm", *map(str, words)], capture_output=True, text=True, timeout=120
    )


def guest(name: str, isa: str) -> bytes:
    return (GUESTS / isa / f"{name}-{isa}.elf").read_bytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_a_guest_runs_out_of_an_image_and_leaves_it_alone(make_image: MakeImage, isa: str, protocol: str) -> None:
    image = make_image({"/boot/hello.elf": guest("hello", isa)})
    before = image.read_bytes()
    done = xipvm("run", "--image", image, "--check", "--protocol", protocol, "/boot/hello.elf")
    assert done.returncode == 0, done.stderr
    assert f"Hello from NOR flash ({isa})" in done.stdout
    assert "of the image" in done.stderr
    assert image.read_bytes() == before


@pytest.mark.parametrize("words", [("--secondary", "gru"), ("--storm", "7,rate=2000"), ("--smp", "2")])
def test_whatever_the_secondary_mmu_has_to_bear(make_image: MakeImage, words: tuple[str, ...]) -> None:
    image = make_image({"/hello.elf": guest("hello", "riscv64"), "/blob": bytes(range(256)) * 64})
    done = xipvm("run", "--image", image, "--check", "--map", "/blob@0x60000000", *words, "/hello.elf")
    assert done.returncode == 0, done.stderr
    assert "0 violations" in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("/nope.elf",), "ENOENT"),
        (("/blob",), "is not an ELF file"),
        (("--map", "/blob@0x60000001", "/hello.elf"), "whole pages"),
        (("--map", "/blob@0x80000000", "/hello.elf"), "RAM is at"),
        (("--map", "/empty@0x60000000", "/hello.elf"), "is empty"),
        (("--map", "/blob@0x60000000", "--map", "/blob@0x60000000", "/hello.elf"), "another file"),
    ],
)
def test_mistakes_are_named(make_image: MakeImage, words: tuple[str, ...], complaint: str) -> None:
    image = make_image({"/hello.elf": guest("hello", "riscv64"), "/blob": b"no guest", "/empty": b""})
    done = xipvm("run", "--image", image, *words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_storm_over_a_shared_mapping_leaves_a_clean_image(make_image: MakeImage, fsck: Callable[[Path], str]) -> None:
    image = make_image({"/hello.elf": guest("hello", "arm64"), "/data": bytes(5) * 10_000})
    words = ("--map", "/data@0x60000000,shared=on", "--check", "--storm", "3,rate=2000")
    done = xipvm("run", "--image", image, *words, "/hello.elf")
    assert done.returncode == 0, done.stderr
    assert "0 violations" in done.stderr
    assert fsck(image) == ""


def test_an_image_larger_than_the_host_takes_what_is_touched(make_image: MakeImage) -> None:
    image = make_image({"/hello.elf": guest("hello", "riscv64")}, "64G", "-N", "1024")
    code = (
        "import sys; from xipvm.machine import Machine\n"
        "with Machine('/hello.elf', image=sys.argv[1]) as machine:\n"
        "    status = machine.run(timeout=60).status\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(status, int(peak.split()[1]) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(image)], capture_output=True, text=True, timeout=120)
    status, megabytes = map(int, done.stdout.split())
    assert status == 0
    assert megabytes < 200
