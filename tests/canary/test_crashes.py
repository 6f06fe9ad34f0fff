"""What kills or hangs the process: tried in a child."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETUP = """
import struct
from unicorn import *
from unicorn import arm64_const as arm
from unicorn.unicorn_const import *

uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
uc.ctl_set_page_size(4096)
uc.ctl_set_tlb_mode(UC_TLB_VIRTUAL)
uc.ctl_exits_enabled(True)
uc.mem_map(0, 1 << 20)
def fill(engine, address, access, entry, user):
    entry.paddr, entry.perms = address, UC_PROT_READ | (UC_PROT_EXEC if access == UC_MEM_FETCH else UC_PROT_WRITE)
    return True
uc.hook_add(UC_HOOK_TLB_FILL, fill)
uc.reg_write(arm.UC_ARM64_REG_X1, 0x20000)
# str w2, [x1]; b .+4; add x3, x3, #1; b .+4; wfi
uc.mem_write(0x10000, struct.pack("<5I", 0xB9000022, 0x14000001, 0x91000463, 0x14000001, 0xD503207F))
"""


def child(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SETUP + body], stdout=subprocess.PIPE, text=True)


def test_a_tlb_flush_in_a_hook_on_memory_writes_crashes() -> None:
    """No MEM hooks anywhere in the core: a write hook could not even flush."""
    with child("""
uc.hook_add(UC_HOOK_MEM_WRITE, lambda *_: uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE))
uc.emu_start(0x10000, 0)
print("survived")
""") as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == -11
    assert "survived" not in out


@pytest.mark.slow
def test_flushing_all_translated_code_in_a_callback_hangs() -> None:
    """ctl_flush_tb is for Engine.release only, where no emu_start is on any stack; elsewhere frames are dropped."""
    with child("""
def write(engine, offset, size, value, user):
    print("flush", flush=True)
    uc.ctl_flush_tb()
uc.mmio_map(1 << 30, 4096, None, None, write, None)
uc.reg_write(arm.UC_ARM64_REG_X1, 1 << 30)
uc.emu_start(0x10000, 0)
print("returned", flush=True)
""") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flush\n"
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1.5)
        finally:
            process.kill()
