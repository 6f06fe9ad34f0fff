"""The bytes behind a bank: erased memory, files, snapshots, readonly files; errors and locks."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from xipvm.devices.flash import mapping
from xipvm.devices.flash.image import FlashImage
from xipvm.errors import BadInput, FlashImageError

SIZE = 0x40000


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "flash.img"
    path.write_bytes(b"\xa5" * SIZE)
    return str(path)


def reason(path, size=SIZE, **options):
    """Why the image cannot be opened, and what a run can do: one line that starts with its name, and bad input."""
    with pytest.raises(FlashImageError) as error:
        FlashImage.open(path, size, **options)
    assert isinstance(error.value, BadInput)
    why = "; ".join(filter(None, (error.value.reason, error.value.hint)))
    assert str(error.value) == f"{path}: {why}"
    assert "\n" not in str(error.value)
    assert error.value.path == path
    return why


@pytest.mark.parametrize("size", [0x1000, SIZE, (3 << 20) + 0x1000])
def test_erased(size):
    with FlashImage.erased(size) as image:
        assert (image.size, image.path, image.readonly, image.private) == (size, None, False, True)
        assert image.view().tobytes() == b"\xff" * size
        assert ctypes.string_at(image.address + size - 1, 1) == b"\xff"
        image.view()[size - 1] = 1
        assert ctypes.string_at(image.address + size - 1, 1) == b"\x01"


def test_erased_images_share_nothing_that_is_written():
    with FlashImage.erased(4 << 20) as one, FlashImage.erased(4 << 20) as other:
        one.view()[0] = 0
        assert one.view()[1 << 20] == 0xFF  # the same page of the filler, one mapping on
        assert other.view()[0] == 0xFF
    with FlashImage.erased(4 << 20) as later:
        assert later.view()[0] == 0xFF


def test_erased_memory_costs_nothing_until_it_is_written(monkeypatch):
    """64 MiB: one reservation and one mapping a MiB, and not a single page of this process."""
    mapping.drop_kept()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls = []
    original = mapping.map_memory
    monkeypatch.setattr(mapping, "map_memory", lambda *arguments: calls.append(arguments) or original(*arguments))
    with FlashImage.erased(64 << 20):
        assert len(calls) == 1 + 64
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB


def test_no_room_for_erased_memory():
    with pytest.raises(FlashImageError, match="erased flash: no room for 4096 TiB"):
        FlashImage.erased(1 << 52)


def test_persistent(path):
    with FlashImage.open(path, SIZE) as image:
        assert (image.readonly, image.private, image.path) == (False, False, path)
        image.view(0x1000, 4, 4)[0] = 0x12345678
        assert image.view(0x1000, 8, 2).tolist() == [0x5678, 0x1234, 0xA5A5, 0xA5A5]
        with open(path, "rb") as file:
            file.seek(0x1000)
            assert file.read(4).hex() == "78563412"
        with pytest.raises(ValueError, match="only a private image"):
            image.revert()


def test_snapshot(path):
    with FlashImage.open(path, SIZE, snapshot=True) as image:
        assert (image.readonly, image.private) == (False, True)
        image.view()[:4] = b"abcd"
        with open(path, "rb") as file:
            assert file.read(4) == b"\xa5" * 4
        image.revert()
        assert image.view(0, 4).tobytes() == b"\xa5" * 4


def test_revert_erased():
    with FlashImage.erased(SIZE) as image:
        image.view()[0x1234] = 0
        image.revert()
        assert image.view().tobytes() == b"\xff" * SIZE


@pytest.mark.parametrize("snapshot", [False, True])
def test_readonly(path, snapshot):
    os.chmod(path, 0o444)
    with FlashImage.open(path, SIZE, readonly=True, snapshot=snapshot) as image:
        assert image.readonly
        assert image.view(4, 4, 2).tolist() == [0xA5A5, 0xA5A5]
        with pytest.raises(TypeError):
            image.view()[0] = 0
        with pytest.raises(TypeError):
            image.view(0, 4, 2)[0] = 0


def test_views_end_with_the_image_and_a_stray_slice_of_one_is_no_crash(path):
    image = FlashImage.open(path, SIZE)
    view = image.view()
    stray = view[:16]
    image.close()
    image.close()
    with pytest.raises(ValueError, match="released"):
        view[0]
    assert stray.tobytes() == b"\xa5" * 16
    FlashImage.open(path, SIZE).close()  # the lock is gone all the same


def test_memory_is_given_back(tmp_path):
    def mapped():
        return any(line.startswith(f"{address:x}-") for line in Path("/proc/self/maps").read_text().splitlines())

    path = tmp_path / "flash.img"
    path.write_bytes(bytes(SIZE))
    image = FlashImage.open(str(path), SIZE, snapshot=True)
    address = image.address
    assert mapped()
    image.close()
    assert not mapped()


def test_erased_memory_is_kept_for_the_next_and_erased_again():
    image = FlashImage.erased(SIZE)
    address = image.address
    view = image.view(0, SIZE)
    view[:4] = b"\0\0\0\0"
    view[-1] = 0
    held = view[:4]
    image.close()
    other = FlashImage.erased(SIZE)
    assert other.address != address  # somebody still looks at it
    held.release()
    again = FlashImage.erased(SIZE)
    assert again.address == address
    assert bytes(again.view(0, SIZE)) == b"\xff" * SIZE
    other.close()
    again.close()


def test_not_all_erased_memory_is_kept():
    images = [FlashImage.erased(SIZE) for _ in range(20)]
    addresses = {image.address for image in images}
    assert len(addresses) == 20
    for image in images:
        image.close()
    mapped = Path("/proc/self/maps").read_text()
    assert sum(f"{address:x}-" in mapped for address in addresses) <= 8


@pytest.mark.parametrize(("offset", "size"), [(-1, 4), (SIZE, 1), (4, SIZE)])
def test_view_outside(offset, size):
    with FlashImage.erased(SIZE) as image, pytest.raises(ValueError, match="outside a flash image"):
        image.view(offset, size)


def test_missing_file(tmp_path):
    path = str(tmp_path / "no.img")
    assert reason(path) == "No such file or directory"
    assert not os.path.exists(path)


def test_directory_and_other_things_that_are_no_file(tmp_path):
    assert reason(str(tmp_path)) == "Is a directory"
    assert reason(str(tmp_path), readonly=True) == "Is a directory"
    os.mkfifo(tmp_path / "fifo")
    assert reason(str(tmp_path / "fifo")) == "is not a regular file"
    assert reason(str(tmp_path / "fifo"), readonly=True) == "is not a regular file"
    assert reason("/dev/zero") == "is not a regular file"
    assert reason(str(tmp_path / "fifo" / "x")) == "Not a directory"
    assert reason("nul\0byte") == "embedded null byte"


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1])
def test_wrong_size(tmp_path, size):
    path = tmp_path / "flash.img"
    path.write_bytes(bytes(size))
    assert reason(str(path)) == f"has {size} bytes, the flash has 262144 (256 KiB)"
    assert path.read_bytes() == bytes(size)


@pytest.fixture
def open_to_all():
    """A directory that a process without rights can enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield directory


@pytest.fixture
def without_rights():
    """Be nobody in particular where the tests run as root, who may do everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_missing_rights(open_to_all, request):
    path = os.path.join(open_to_all, "flash.img")
    with open(path, "wb") as file:
        file.write(bytes(SIZE))
    os.chmod(path, 0o444)
    request.getfixturevalue("without_rights")
    assert reason(path) == "Permission denied; snapshot=on or readonly=on only read it"
    FlashImage.open(path, SIZE, snapshot=True).close()


def test_unreadable(open_to_all, request):
    path = os.path.join(open_to_all, "flash.img")
    with open(path, "wb") as file:
        file.write(bytes(SIZE))
    os.chmod(path, 0)
    request.getfixturevalue("without_rights")
    assert reason(path, readonly=True) == "Permission denied"


def test_failed_open_leaves_no_descriptor_and_no_lock(path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        reason(path, SIZE + 1)
    assert len(os.listdir("/proc/self/fd")) == before
    FlashImage.open(path, SIZE).close()


HOLD = """
import sys
from xipvm.devices.flash.image import FlashImage
options = {name: True for name in sys.argv[3:]}
image = FlashImage.open(sys.argv[1], int(sys.argv[2]), **options)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Another process that has an image open, until the test ends."""
    children = []

    def start(path, *options):
        command = [sys.executable, "-c", HOLD, path, str(SIZE), *options]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(child)
        assert child.stdout.readline() == b"open\n"
        return child

    yield start
    for child in children:
        child.communicate()
        assert child.returncode in (0, -9)


def test_two_processes_do_not_write_one_image(path, hold):
    child = hold(path)
    assert reason(path) == "in use by another run; only runs with snapshot=on or readonly=on share an image"
    assert reason(path, snapshot=True) == reason(path, readonly=True) == "in use by another run"
    child.kill()
    child.wait()
    FlashImage.open(path, SIZE).close()


@pytest.mark.parametrize("option", ["snapshot", "readonly"])
def test_readers_share_an_image_and_keep_writers_out(path, hold, option):
    hold(path, option)
    FlashImage.open(path, SIZE, snapshot=True).close()
    FlashImage.open(path, SIZE, readonly=True).close()
    assert reason(path).startswith("in use by another run")


def test_two_machines_of_one_process_do_not_write_one_image(path):
    with FlashImage.open(path, SIZE):
        assert reason(path).startswith("in use by another run")
        assert reason(path, snapshot=True) == "in use by another run"


def test_holes_are_filled_when_the_image_is_opened(tmp_path):
    path = str(tmp_path / "sparse.img")
    with open(path, "wb") as file:
        file.truncate(SIZE)
    with FlashImage.open(path, SIZE, snapshot=True) as image:
        assert os.stat(path).st_blocks == 0
        assert image.view()[0] == 0
    with FlashImage.open(path, SIZE):
        assert os.stat(path).st_blocks * 512 >= SIZE
