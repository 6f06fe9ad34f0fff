"""Image options, which file fills which bank, making and padding image files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from xipvm.devices.flash.files import ImageOption, create, open_banks, pad, parse_option, wanted_size
from xipvm.devices.flash.image import FlashImage
from xipvm.errors import FlashImageError

BANK = 0x40000
TWO = (BANK, BANK)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("a.img", ImageOption("a.img")),
        ("a.img,bank=1", ImageOption("a.img", 1)),
        ("a,,b.img,snapshot=on", ImageOption("a,b.img", snapshot=True)),
        ("a,,,snapshot=on", ImageOption("a,", snapshot=True)),
        (",,,,", ImageOption(",,")),
        ("a.img,readonly=on,snapshot=off,bank=0", ImageOption("a.img", 0, readonly=True)),
        ("a.img,snapshot=on,snapshot=off", ImageOption("a.img")),
        ("bank=1", ImageOption("bank=1")),
        ("dir/with space=x.img", ImageOption("dir/with space=x.img")),
    ],
)
def test_parse_option(text, option):
    assert parse_option(text) == option


@pytest.mark.parametrize(
    "text", ["a.img,", "a.img,bank", "a.img,bank=", "a.img,bank=-1", "a.img,bank=x", "a.img,bank=²", "a.img,snapshot",
             "a.img,snapshot=yes", "a.img,format=raw", "a.img,READONLY=on"]
)  # fmt: skip
def test_unknown_settings(text):
    with pytest.raises(FlashImageError, match=r"^a.img: '.*' is no setting of a flash image; there are bank=N"):
        parse_option(text)


@pytest.mark.parametrize("text", ["", ",bank=1", ",snapshot=on"])
def test_option_without_a_file(text):
    with pytest.raises(FlashImageError, match="no file is named"):
        parse_option(text)


@pytest.fixture
def make_file(tmp_path):
    def make(name, size, byte=0xA5):
        path = tmp_path / name
        path.write_bytes(bytes([byte]) * size)
        return str(path)

    return make


@pytest.fixture
def open_all():
    """open_banks for a board "two" with two banks, closed after the test."""
    opened = []

    def run(*options, sizes=TWO):
        banks = open_banks([parse_option(option) for option in options], sizes, board="two")
        opened.extend(bank.image for bank in banks)
        return banks

    yield run
    for image in opened:
        image.close()


def first_bytes(banks):
    return [bank.image.view()[bank.offset] for bank in banks]


def test_banks_without_files_are_erased(open_all):
    banks = open_all()
    assert first_bytes(banks) == [0xFF, 0xFF]
    assert [(bank.image.path, bank.image.size, bank.offset) for bank in banks] == [(None, BANK, 0)] * 2
    assert open_all(sizes=()) == []


def test_a_file_of_one_bank_is_bank_0(open_all, make_file):
    assert first_bytes(open_all(make_file("a", BANK, 1))) == [1, 0xFF]


def test_a_file_of_all_banks_is_all_banks_in_order(open_all, make_file):
    path = make_file("a", 2 * BANK)
    with open(path, "r+b") as file:
        file.seek(BANK)
        file.write(b"\x07")
    banks = open_all(path)
    assert first_bytes(banks) == [0xA5, 7]
    assert banks[0].image is banks[1].image
    assert [bank.offset for bank in banks] == [0, BANK]


def test_one_file_for_banks_of_different_sizes(open_all, make_file):
    banks = open_all(make_file("a", 0x6000), sizes=(0x1000, 0x3000, 0x2000))
    assert [bank.offset for bank in banks] == [0, 0x1000, 0x4000]


def test_files_for_each_bank(open_all, make_file):
    banks = open_all(make_file("a", BANK, 1) + ",bank=1,readonly=on", make_file("b", BANK, 2))
    assert first_bytes(banks) == [2, 1]
    assert [bank.image.readonly for bank in banks] == [False, True]


def test_banks_of_different_sizes(open_all, make_file):
    banks = open_all(make_file("a", 0x1000, 1) + ",bank=1", sizes=(BANK, 0x1000))
    assert first_bytes(banks) == [0xFF, 1]


@pytest.mark.parametrize(
    ("size", "option", "why"),
    [
        (1000, "", "has 1000 bytes; bank 0 of two has 262144, all of its flash 524288: xipvm flash pad {} --board two"),
        (BANK + 1, "", "has 262145 bytes; bank 0 of two has 262144, all of its flash 524288: "
                       "xipvm flash pad {} --board two"),
        (1000, ",bank=0", "has 1000 bytes; bank 0 of two has 262144: xipvm flash pad {} --board two"),
        (1000, ",bank=1", "has 1000 bytes; bank 1 of two has 262144: xipvm flash pad {} --board two --bank 1"),
        (2 * BANK + 1, "", "has 524289 bytes, too many: the board has 2 banks of 256 KiB"),
        (2 * BANK, ",bank=1", "has 524288 bytes, too many: bank 1 has 256 KiB"),
        (BANK, ",bank=2", "bank=2: the board has 2 banks of 256 KiB"),
    ],
)  # fmt: skip
def test_wrong_sizes_name_the_right_one_and_the_command(open_all, make_file, size, option, why):
    path = make_file("it's.img", size)
    with pytest.raises(FlashImageError) as error:
        open_all(path + option)
    quoted = "'" + path.replace("'", "'\"'\"'") + "'"
    assert error.value.reason == why.format(quoted)
    pad(path, size)  # nothing holds the lock


def test_a_board_with_one_bank_or_none(open_all, make_file):
    path = make_file("a.img", 12)
    with pytest.raises(
        FlashImageError, match=r"has 12 bytes; the flash of two has 262144: xipvm flash pad \S+ --board"
    ):
        open_all(path, sizes=(BANK,))
    with pytest.raises(FlashImageError, match=r"bank=1: the board has 1 bank of 256 KiB"):
        open_all(path + ",bank=1", sizes=(BANK,))
    with pytest.raises(FlashImageError, match="two has no flash"):
        open_all(path, sizes=())
    with pytest.raises(FlashImageError, match="2 banks of 256 KiB, 4 KiB"):
        open_all(path + ",bank=2", sizes=(BANK, 0x1000))


def test_the_bank_of_two_files(open_all, make_file):
    one = make_file("a", BANK)
    with pytest.raises(FlashImageError, match=r"bank 0 has an image already; say bank=N"):
        open_all(one, make_file("b", BANK))
    with pytest.raises(FlashImageError, match=r"bank 1 has an image already"):
        open_all(one + ",bank=1", make_file("c", 2 * BANK))
    with FlashImage.open(one, BANK):
        pass  # a failed open_banks left no lock behind


def test_a_missing_file_is_reported_as_missing(open_all):
    with pytest.raises(FlashImageError, match=r"no\.img: No such file or directory"):
        open_all("no.img")
    with pytest.raises(FlashImageError, match="Is a directory"):
        open_all("/tmp")


def test_wanted_size(tmp_path):
    assert [wanted_size("f", length, TWO) for length in (0, 1, BANK, BANK + 1, 2 * BANK)] == [
        BANK, BANK, BANK, 2 * BANK, 2 * BANK,
    ]  # fmt: skip
    assert wanted_size("f", 5, (BANK, 0x1000), 1) == 0x1000
    with pytest.raises(FlashImageError, match="too many"):
        wanted_size("f", 0x1001, (BANK, 0x1000), 1)


def test_create(tmp_path):
    path = tmp_path / "new.img"
    steps = []
    create(str(path), 3 * (1 << 20) + 5, progress=lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == b"\xff" * (3 * (1 << 20) + 5)
    assert steps == [(min(i << 20, 3145733), 3145733) for i in range(1, 5)]
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~_umask()
    assert os.listdir(tmp_path) == ["new.img"]
    with FlashImage.open(str(path), 3145733):
        pass


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_create_never_overwrites_unless_forced(tmp_path, make_file):
    path = make_file("a.img", 10)
    with pytest.raises(FlashImageError, match=r"a.img: exists; --force replaces it"):
        create(path, BANK)
    assert os.path.getsize(path) == 10
    create(path, BANK, force=True)
    with open(path, "rb") as file:
        assert file.read() == b"\xff" * BANK
    assert os.listdir(tmp_path) == ["a.img"]


def test_create_loses_a_race_without_harm(tmp_path):
    path = tmp_path / "a.img"

    def somebody_else(done, total):
        path.write_bytes(b"theirs")

    with pytest.raises(FlashImageError, match="exists; --force replaces it"):
        create(str(path), BANK, progress=somebody_else)
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.img"]


def test_create_leaves_an_image_in_use_alone(make_file):
    path = make_file("a.img", BANK)
    with FlashImage.open(path, BANK), pytest.raises(FlashImageError, match="in use by another run"):
        create(path, BANK, force=True)
    with open(path, "rb") as file:
        assert file.read() == b"\xa5" * BANK


def test_create_replaces_what_a_link_points_to(tmp_path, make_file):
    path = make_file("a.img", 10)
    os.symlink(path, tmp_path / "link")
    create(str(tmp_path / "link"), BANK, force=True)
    assert os.path.islink(tmp_path / "link")
    assert os.path.getsize(path) == BANK


def test_create_in_places_that_do_not_work(tmp_path):
    with pytest.raises(FlashImageError, match="Is a directory"):
        create(str(tmp_path), BANK, force=True)
    with pytest.raises(FlashImageError, match="cannot be created: No such file or directory"):
        create(str(tmp_path / "no" / "a.img"), BANK)
    with pytest.raises(FlashImageError, match="cannot be created: embedded null byte"):
        create("a\0b", BANK)
    with pytest.raises(FlashImageError, match="is not a regular file"):
        create("/dev/null", BANK, force=True)


def test_create_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(str(tmp_path / "a.img"), BANK, progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_pad(make_file):
    path = make_file("a.img", 1000)
    assert pad(path, BANK) == BANK - 1000
    with open(path, "rb") as file:
        assert file.read() == b"\xa5" * 1000 + b"\xff" * (BANK - 1000)
    assert pad(path, BANK) == 0
    with pytest.raises(FlashImageError, match=r"has 262144 bytes already, more than 4096 \(4 KiB\)"):
        pad(path, 4096)
    assert os.path.getsize(path) == BANK


def test_pad_refuses_what_it_cannot_pad(tmp_path, make_file):
    path = make_file("a.img", BANK)
    with FlashImage.open(path, BANK, snapshot=True), pytest.raises(FlashImageError, match="in use by another run"):
        pad(path, 2 * BANK)
    with pytest.raises(FlashImageError, match="No such file or directory"):
        pad(str(tmp_path / "no.img"), BANK)


def test_pad_that_is_interrupted_is_undone(make_file):
    path = make_file("a.img", 1000)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pad(path, BANK, progress=interrupt)
    assert os.path.getsize(path) == 1000


FULL = """
import os, resource, sys
from xipvm.devices.flash.files import create, pad
from xipvm.devices.flash.image import FlashImage
from xipvm.errors import FlashImageError

def attempt(what, *arguments, **options):
    try:
        what(*arguments, **options)
    except FlashImageError as error:
        print(error.reason)
    else:
        print("done")

directory, mode = sys.argv[1:]
os.chdir(directory)
with open("old.img", "wb") as file:
    file.write(b"old")
with open("sparse.img", "wb") as file:
    file.truncate(2 << 20)
if mode == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
attempt(create, "new.img", 2 << 20)
attempt(create, "old.img", 2 << 20, force=True)
attempt(pad, "old.img", 2 << 20)
if mode == "disk":
    attempt(FlashImage.open, "sparse.img", 2 << 20)
os.remove("sparse.img")
print(sorted(os.listdir(".")), open("old.img", "rb").read())
"""


def run_full(directory, mode, *prefix):
    command = [*prefix, sys.executable, "-c", FULL, str(directory), mode]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_file_size_limit_leaves_nothing_half_made(tmp_path):
    assert run_full(tmp_path, "limit") == [
        "cannot be created: more than the limit on file sizes",
        "cannot be created: more than the limit on file sizes",
        "cannot be padded: more than the limit on file sizes",
        "['old.img'] b'old'",
    ]


def test_a_full_disk_leaves_nothing_half_made(tmp_path):
    """On a tmpfs of 1 MiB in a mount namespace of its own, where the tests may make one."""
    inside = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    assert run_full(tmp_path, "disk", *inside) == [
        "cannot be created: No space left on device",
        "cannot be created: No space left on device",
        "cannot be padded: No space left on device",
        "no room for its 2 MiB: No space left on device",
        "['old.img'] b'old'",
    ]
