"""Block locks, and readonly images, which report every block as locked."""

from __future__ import annotations

import pytest

from xipvm.devices.flash.image import FlashImage


def test_locked_block_refuses_program_and_erase(rig, driver, driver_error):
    driver.program_word(0x4000, 0x0F0F_0F0F)
    driver.lock(0x4000)
    assert driver.locks(0x4000) == [1, 1]
    assert driver.locks(0x0000) == driver.locks(0x8000) == [0, 0]
    before = rig.array
    with pytest.raises(driver_error) as program:
        driver.program_word(0x4000, 0)
    assert program.value.status == [0x92, 0x92]
    with pytest.raises(driver_error) as buffered:
        driver.program_buffer(0x4000, bytes(8))
    assert buffered.value.status == [0x92, 0x92]
    with pytest.raises(driver_error) as erase:
        driver.erase(0x4000)
    assert erase.value.status == [0xA2, 0xA2]
    assert rig.array == before
    driver.erase(0x8000)
    driver.unlock(0x4000)
    driver.erase(0x4000)
    assert driver.locks(0x4000) == [0, 0]
    assert rig.array.count(0xFF) == len(rig.array)


def test_lock_down_lasts_until_reset(rig, driver):
    driver.lock(0x4000, 0x2F)
    assert driver.locks(0x4000) == [3, 3]
    driver.unlock(0x4000)
    assert driver.locks(0x4000) == [3, 3]
    assert rig.kinds("flash_error")[0]["what"] == "chip 0: unlock of a block that is locked down"
    rig.bank.reset()
    assert driver.locks(0x4000) == [0, 0]


def test_powerup_locked(make_rig, make_driver, driver_error):
    rig = make_rig(powerup_locked=True)
    driver = make_driver(rig)
    with pytest.raises(driver_error):
        driver.erase(0)
    driver.unlock(0)
    driver.erase(0)
    rig.bank.reset()
    assert driver.locks(0) == [1, 1]


def test_the_block_of_the_second_address_is_locked(rig, driver):
    rig.command(0x4000, 0x60)
    rig.command(0x8000, 0x01)
    rig.command(0, 0xFF)
    assert [driver.locks(offset)[0] for offset in (0, 0x4000, 0x8000)] == [0, 0, 1]


def test_readonly_image(tmp_path, make_rig, make_driver, driver_error):
    path = tmp_path / "flash.img"
    path.write_bytes(b"\xa5" * 0x40000)
    rig = make_rig(FlashImage.open(str(path), 0x40000, readonly=True))
    driver = make_driver(rig)
    for attempt, status in (
        (lambda: driver.program_word(0, 0), 0x92),
        (lambda: driver.program_buffer(0, bytes(8)), 0x92),
        (lambda: driver.erase(0), 0xA2),
    ):
        with pytest.raises(driver_error) as error:
            attempt()
        assert error.value.status == [status, status]
    assert rig.array == b"\xa5" * 0x40000
    assert rig.bank.programs == rig.bank.erases == 0
    assert {event["what"] for event in rig.kinds("flash_error")} == {
        f"chip {chip}: {what} of a readonly image" for chip in (0, 1) for what in ("program", "block erase")
    }
