/*
 * reprogram: flash that is executed, reprogrammed, and executed again.
 *
 * A function is programmed into a sector and called; the sector is erased, another function is programmed at the same
 * address and called; and then bits of that one are cleared without an erase, and it is called once more. Every call
 * must run what is in flash at that time. All of it happens twice: in the bank that this code itself runs from (the
 * driver is in RAM, see common/flash.h), and in the other one.
 */
#include "flash.h"

#define SECTOR_NUMBER 16

/* The third is the second with ones cleared. */
#define FIRST 0x155u
#define SECOND 0x2aau
#define THIRD 0x0aau

static bool call_and_compare(u64 address, const char *what, u32 expected)
{
    u32 (*function)(void) = (u32 (*)(void))address;
    u32 code[2];
    u32 got;

    write_return(code, expected);
    bool stored = read32(address) == code[0] && read32(address + 4) == code[1];
    got = function();
    print("  %s: flash holds %08x, returns %x%s\n", what, (u64)read32(address), (u64)got,
          !stored            ? " WRONG CONTENTS"
          : got != expected ? " STALE"
                            : "");
    return stored && got == expected;
}

static bool program_function(u64 address, u32 value)
{
    u32 code[2];

    write_return(code, value);
    if (!flash_program(address, code, ARRAY_SIZE(code)))
        return false;
    sync_code((void *)address, sizeof(code));
    return true;
}

static bool try_bank(const char *name, u64 bank)
{
    u64 sector = bank + SECTOR_NUMBER * FLASH_SECTOR;
    bool good = true;

    print("%s, sector at %08x\n", name, sector);
    good &= flash_erase(sector) && program_function(sector, FIRST);
    good &= call_and_compare(sector, "programmed         ", FIRST);
    good &= flash_erase(sector) && program_function(sector, SECOND);
    good &= call_and_compare(sector, "erased, programmed ", SECOND);
    good &= program_function(sector, THIRD);
    good &= call_and_compare(sector, "programmed over it ", THIRD);
    return good;
}

int main(void)
{
    bool good = true;

    good &= try_bank("bank 0, which runs this", FLASH_BANK0);
    good &= try_bank("bank 1", FLASH_BANK1);
    print("reprogram: %s\n", good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
