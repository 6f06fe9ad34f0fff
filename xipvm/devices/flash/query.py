"""The CFI query table and the identifier codes of an Intel/Sharp (command set 0x0001) chip.

The table is that of JEDEC JESD68 with the primary vendor table of Intel's extended command set at 0x31. Where a
guest can tell, the values are those of QEMU's pflash_cfi01 (voltages, times, geometry, buffer size); the
features are ours: erase and program suspend, individual block locking, and program during erase suspend.
"""

from __future__ import annotations

from xipvm.devices.flash.geometry import ChipGeometry

PRIMARY = 0x31
FEATURE_ERASE_SUSPEND = 1 << 1
FEATURE_PROGRAM_SUSPEND = 1 << 2
FEATURE_BLOCK_LOCK = 1 << 5


def query_table(geometry: ChipGeometry) -> bytes:
    """The query table of one chip, indexed by query address (0x10 is ``Q``); zero elsewhere."""
    table = bytearray(0x52)

    def put(address: int, *values: int) -> None:
        table[address : address + len(values)] = bytes(values)

    def word(value: int) -> tuple[int, int]:
        return value & 0xFF, value >> 8

    put(0x10, *b"QRY", *word(0x0001), *word(PRIMARY))
    put(0x1B, 0x45, 0x55, 0x00, 0x00)  # Vcc 4.5 to 5.5 V, no Vpp pin
    put(0x1F, 0x07, 0x07, 0x0A, 0x00)  # typically 2^7 us a word or buffer, 2^10 ms a block: geometry.TYPICAL
    put(0x23, 0x04, 0x04, 0x04, 0x00)  # sixteen times as long at most
    put(0x27, geometry.size.bit_length() - 1)
    put(0x28, *word(0x0002))  # x8/x16 interface
    put(0x2A, *word(geometry.buffer.bit_length() - 1))
    put(0x2C, 1, *word(geometry.blocks - 1), *word(geometry.block // 256))
    put(PRIMARY, *b"PRI", *b"10")
    put(PRIMARY + 5, FEATURE_ERASE_SUSPEND | FEATURE_PROGRAM_SUSPEND | FEATURE_BLOCK_LOCK)
    put(PRIMARY + 9, 0x01)  # program works while an erase is suspended
    put(PRIMARY + 10, *word(0x0003))  # block status: lock and lock-down bits
    return bytes(table)
