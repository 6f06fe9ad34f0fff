/* flash.c: see flash.h. Commands and status bits are those of the Intel/Sharp command set. */
#include "flash.h"

/* Both chips get every command, and both answer. */
#define LANES(value) ((value) * 0x00010001u)

#define READ_ARRAY LANES(0xffu)
#define CLEAR_STATUS LANES(0x50u)
#define LOCK_SETUP LANES(0x60u)
#define ERASE_SETUP LANES(0x20u)
#define CONFIRM LANES(0xd0u)
#define PROGRAM LANES(0x40u)

#define READY LANES(0x80u)
#define ERRORS LANES(0x3au) /* erase, program, Vpp, block locked */

RAMTEXT static u32 wait_ready(volatile u32 *bank)
{
    u32 status;

    do
        status = *bank;
    while ((status & READY) != READY);
    return status;
}

RAMTEXT bool flash_erase(u64 sector)
{
    volatile u32 *bank = (volatile u32 *)sector;
    u32 status;

    *bank = CLEAR_STATUS;
    *bank = LOCK_SETUP; /* many parts come out of reset with every block locked */
    *bank = CONFIRM;
    *bank = ERASE_SETUP;
    *bank = CONFIRM;
    status = wait_ready(bank);
    *bank = READ_ARRAY;
    return !(status & ERRORS);
}

RAMTEXT bool flash_program(u64 address, const u32 *words, size_t count)
{
    volatile u32 *bank = (volatile u32 *)address;
    u32 status = 0;

    *bank = CLEAR_STATUS;
    for (size_t i = 0; i < count; i++) {
        bank[i] = PROGRAM;
        bank[i] = words[i];
        status |= wait_ready(bank);
    }
    *bank = READ_ARRAY;
    return !(status & ERRORS);
}
