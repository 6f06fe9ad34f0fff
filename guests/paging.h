/*
 * paging.h: entries of the guest's own page tables, and how translation is turned on. For guests whose map begins as the
 * identity: arm64 at EL1 with a 39-bit TTBR0 map of 4 KiB granules; riscv64 Sv39 in S-mode, whose traps go to M-mode,
 * which has no translation and finds everything where it is.
 */
#ifndef PAGING_H
#define PAGING_H

#include "guest.h"

#define GIB 0x40000000ul

enum rights { READ_WRITE, READ_ONLY, READ_WRITE_EXECUTE };

#if defined(__aarch64__)

#define DESCRIPTOR_TABLE 3u
#define DESCRIPTOR_BLOCK 1u
#define DESCRIPTOR_PAGE 3u
#define ATTRIBUTE(index) ((index) << 2)
#define NORMAL ATTRIBUTE(0ul)
#define UNCACHED ATTRIBUTE(1ul)
#define DEVICE ATTRIBUTE(2ul)
#define MAIR_VALUE 0x0044fful /* in this order: write-back, non-cacheable, Device-nGnRnE */
#define AP_READ_ONLY (2ul << 6)
#define ACCESSED (1ul << 10)
#define NEVER_EXECUTE (3ul << 53) /* UXN, PXN */
#define TCR_VALUE (25ul | 1ul << 23 | 1ul << 32) /* T0SZ: 39 bits; no TTBR1; 36 bits of physical address */
#define SCTLR_MMU_ON 1ul

static u64 table(const u64 *next) { return (u64)next | DESCRIPTOR_TABLE; }
static u64 ram_block(u64 physical) { return physical | NORMAL | ACCESSED | DESCRIPTOR_BLOCK; }

static u64 low_block(u64 physical)
{
    bool is_flash = physical < FLASH_BANK1 + FLASH_BANK1; /* two banks of the same size */

    return physical | ACCESSED | DESCRIPTOR_BLOCK | (is_flash ? UNCACHED : DEVICE | NEVER_EXECUTE);
}

static u64 page(u64 physical, enum rights rights)
{
    return physical | NORMAL | ACCESSED | DESCRIPTOR_PAGE | (rights == READ_ONLY ? AP_READ_ONLY : 0) |
           (rights == READ_WRITE_EXECUTE ? 0 : NEVER_EXECUTE);
}

static void forget_translation(u64 address)
{
    __asm__ volatile("dsb ishst\n\ttlbi vaae1is, %0\n\tdsb ish\n\tisb" : : "r"(address >> 12) : "memory");
}

static void run_translated(const u64 *root, void (*entry)(void))
{
    u64 sctlr;

    __asm__ volatile("msr mair_el1, %0" : : "r"(MAIR_VALUE));
    __asm__ volatile("msr tcr_el1, %0" : : "r"(TCR_VALUE));
    __asm__ volatile("msr ttbr0_el1, %0" : : "r"(root));
    __asm__ volatile("dsb sy\n\ttlbi vmalle1\n\tdsb sy\n\tisb" : : : "memory");
    __asm__ volatile("mrs %0, sctlr_el1" : "=r"(sctlr));
    __asm__ volatile("msr sctlr_el1, %0\n\tisb" : : "r"(sctlr | SCTLR_MMU_ON) : "memory");
    entry();
    __asm__ volatile("dsb sy\n\tmsr sctlr_el1, %0\n\tisb" : : "r"(sctlr) : "memory");
}

#else

#define VALID 0x01ul
#define READ 0x02ul
#define WRITE 0x04ul
#define EXECUTE 0x08ul
#define ACCESSED_DIRTY 0xc0ul
#define SV39 (8ul << 60)
#define MPP_MASK 0x1800ul
#define MPP_S 0x0800ul

static u64 entry_of(u64 physical, u64 flags) { return physical >> 12 << 10 | flags | VALID; }
static u64 table(const u64 *next) { return entry_of((u64)next, 0); }
static u64 ram_block(u64 physical) { return entry_of(physical, READ | WRITE | EXECUTE | ACCESSED_DIRTY); }
static u64 low_block(u64 physical) { return entry_of(physical, READ | WRITE | EXECUTE | ACCESSED_DIRTY); }

static u64 page(u64 physical, enum rights rights)
{
    return entry_of(physical, READ | ACCESSED_DIRTY | (rights == READ_ONLY ? 0 : WRITE) |
                                  (rights == READ_WRITE_EXECUTE ? EXECUTE : 0));
}

static void forget_translation(u64 address) { __asm__ volatile("sfence.vma %0" : : "r"(address) : "memory"); }

/* Goes to S-mode and back in the middle of a function: translation reaches neither this code nor its stack. The
 * ecall that ends it is answered in on_trap(). */
static void run_translated(const u64 *root, void (*entry)(void))
{
    __asm__ volatile("csrw pmpaddr0, %0\n\tcsrw pmpcfg0, %1" : : "r"(~0ul), "r"(0x1ful)); /* NAPOT, RWX */
    __asm__ volatile("csrw satp, %0\n\tsfence.vma" : : "r"(SV39 | (u64)root >> 12) : "memory");
    __asm__ volatile("csrc mstatus, %0\n\tcsrs mstatus, %1\n\t"
                     "lla t0, 1f\n\tcsrw mepc, t0\n\tmret\n1:"
                     :
                     : "r"(MPP_MASK), "r"(MPP_S)
                     : "t0", "memory");
    entry();
    __asm__ volatile("ecall" : : : "memory");
    __asm__ volatile("csrw satp, zero\n\tsfence.vma" : : : "memory");
}

#endif

#endif
