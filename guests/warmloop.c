/*
 * warmloop: code in flash that puts its own bank into status mode and polls it.
 *
 * On hardware the next fetch brings a status word instead of an instruction, and that is the end. An emulator that
 * only looks at translated code may run on, as long as it has met the loop before; so the loop is made warm with a
 * command that changes nothing, and then given the one that must not be survived. A guest that ends by itself, with
 * whatever status, has not been run as flash would run it.
 */
#include "guest.h"

#define LANES(value) ((value) * 0x00010001u)
#define READ_ARRAY LANES(0xffu)
#define READ_STATUS LANES(0x70u)
#define READY LANES(0x80u)

#define WARM_ROUNDS 1000

/* An erased word far from the code: its array contents look ready, too. */
#define POLLED (FLASH_BANK0 + 8 * FLASH_SECTOR)

/* Back in read-array mode before it returns, so that only its own loop is fetched in the other one. */
__attribute__((noinline)) static u32 command_and_poll(u32 command)
{
    volatile u32 *bank = (volatile u32 *)POLLED;
    u32 status;

    *bank = command;
    do
        status = *bank;
    while ((status & READY) != READY);
    *bank = READ_ARRAY;
    return status;
}

int main(void)
{
    u32 status = 0;

    for (int round = 0; round < WARM_ROUNDS; round++)
        status |= command_and_poll(READ_ARRAY);
    print("warmloop: warm, array reads %08x; now the bank I run from goes into status mode\n", (u64)status);

    status = command_and_poll(READ_STATUS);
    print("warmloop: SURVIVED, status %08x\n", (u64)status);
    return 1;
}
