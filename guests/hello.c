/*
 * hello: the smallest guest that shows where everything lies.
 *
 * The banner is read from flash while the code that prints it is fetched from flash. `greeting` is initialised data:
 * its bytes were stored in flash behind the code, the start code has copied them to RAM, and so they can be changed.
 */
#include "guest.h"

static const char banner[] = "Hello from NOR flash";
static char greeting[] = "data copied to RAM by the guest";
static u64 zeroed[4];

static bool inside(const void *pointer, u64 base, u64 size)
{
    return (u64)pointer - base < size;
}

int main(void)
{
    bool good = true;

    print("%s (%s)\n", banner, isa_name);
    print("  code   at %08x\n", (u64)main);
    print("  const  at %08x\n", (u64)banner);
    print("  data   at %08x: %s\n", (u64)greeting, greeting);
    print("  bss    at %08x: %u\n", (u64)zeroed, zeroed[0] | zeroed[1] | zeroed[2] | zeroed[3]);

    good &= inside((void *)main, FLASH_BANK0, FLASH_SECTOR);
    good &= inside(banner, FLASH_BANK0, FLASH_SECTOR);
    good &= inside(greeting, RAM_BASE, 0x8000000);
    good &= inside(zeroed, RAM_BASE, 0x8000000);

    *(volatile char *)greeting = 'D';
    good &= greeting[0] == 'D';
    print("%s\n", good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
