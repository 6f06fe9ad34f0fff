/*
 * kernel.h: a kernel in the upper half that runs in place from flash, and its processes.
 *
 * All of physical memory below 4 GiB appears at KERNEL_BASE: flash to be executed, RAM to be read and written, devices.
 * Below are the processes, each with tables of its own and the ASID of its slot. One process runs at a time, on one
 * kernel stack: a system call that has to wait is made again when there is something to be had.
 */
#ifndef KERNEL_H
#define KERNEL_H

#include "guest.h"

#define KERNEL_BASE 0xffffffc000000000ul
#define USER_END 0x4000000000ul /* 38 bits: the lower half of Sv39, and of what T0SZ = 25 leaves */
#define STACK_TOP 0x3ffffff000ul
#define STACK_PAGES 16
#define LEVELS 3 /* 2: 1 GiB, 1: 2 MiB, 0: pages */
#define BLOCK_SIZE 0x200000ul

void *memcpy(void *restrict to, const void *restrict from, size_t size); /* common/memory.c */

static inline void *virtual(u64 physical) { return (void *)(physical + KERNEL_BASE); }
static inline u64 physical(const void *address) { return (u64)address - KERNEL_BASE; }

/* --- entry-<isa>.S, machine-<isa>.c ---------------------------------------------------------------------------- */

/* What an entry of a table says, in the same words on both ISAs. All are readable. */
enum { P_WRITE = 1, P_EXECUTE = 2, P_USER = 4, P_ACCESSED = 8, P_DIRTY = 16, P_SHARED = 32, P_DEVICE = 64 };

u64 leaf_entry(u64 address, unsigned flags, int level);
u64 table_entry(u64 address);
bool entry_valid(u64 entry);
bool entry_is_table(u64 entry, int level);
u64 entry_address(u64 entry);
unsigned entry_flags(u64 entry);

void flush_page(u64 address, unsigned asid);
void flush_asid(unsigned asid);
void use_tables(u64 root, unsigned asid);
/* After main() has begun: the lower half belongs to processes. */
void leave_boot_tables(void);

/* What a trap was. For a fault the address is trap->address. */
enum event { EVENT_CALL, EVENT_READ, EVENT_WRITE, EVENT_FETCH, EVENT_TIMER, EVENT_UNDEFINED, EVENT_OTHER };
enum event event_of(const struct trap *trap, bool is_interrupt);

u64 call_number(const struct trap *trap);
u64 *call_argument(struct trap *trap, unsigned number); /* 0..3; 0 is the answer's, too */
void call_again(struct trap *trap);                     /* makes the system call once more */
void call_done(struct trap *trap);
void user_registers(struct trap *trap, u64 entry, u64 stack, u64 argument);

void timer_start(void);
void timer_acknowledge(void);
void wait_for_timer(void);

/* One byte at a time, with the rights of the process. False, when it has none that vm_fault() could give. */
bool copy_from_user(void *to, u64 from, size_t size);
bool copy_to_user(u64 to, const void *from, size_t size);
/* Whether the kernel's own load of a page of the process fails, as it should. */
bool kernel_is_kept_out(u64 address);

/* --- vm.c ------------------------------------------------------------------------------------------------------ */

enum kind { REGION_NONE, REGION_FLASH, REGION_COPY, REGION_ZERO, REGION_SHARED, REGION_BLOCK };

struct region {
    u64 start, end;
    enum kind kind;
    unsigned rights;  /* P_WRITE, P_EXECUTE */
    u64 source;       /* physical address of what is at `start`, for FLASH and COPY */
    u64 source_bytes; /* behind them are zeros */
};

#define MAX_REGIONS 12
#define MAX_FILES 8

struct space {
    u64 root;
    unsigned asid;
    struct region regions[MAX_REGIONS];
};

void vm_begin(void);
u64 vm_free_frames(void);
void vm_new(struct space *space, unsigned asid);
void vm_clear(struct space *space);
void vm_delete(struct space *space);
void vm_fork(struct space *child, struct space *parent);
struct region *vm_add(struct space *space, u64 start, u64 bytes, enum kind kind, unsigned rights);
bool vm_alias(struct space *space, u64 to, u64 from, unsigned rights);
bool vm_fault(struct space *space, u64 address, enum event access);
u64 *vm_entry(struct space *space, u64 address, int *level); /* NULL without one */

/* --- processes.c ----------------------------------------------------------------------------------------------- */

_Noreturn void panic(const char *why, const struct trap *trap);

#endif
