/*
 * guest.h: what every guest may use.
 *
 * A guest is linked to run in place: code and constants stay in NOR flash, and only .data is copied to RAM by the
 * start code (start-<isa>.S), which then clears .bss, sets the stack and calls main(). What main() returns is the
 * guest's exit status. Nothing else is there: no libc, no heap, no floating point, MMU off, interrupts masked.
 *
 * Everything that differs between the ISAs is in arm64.c and riscv64.c, and for constants in board.h.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "board.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE_SIZE 4096u
#define MAX_CPUS 8u
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* Code for which flash may not be read meanwhile: linked to run in RAM, copied there with .data. Such a function may
 * not call out of RAM, nor use constants that the compiler would put into .rodata (strings, switch tables). */
#define RAMTEXT __attribute__((section(".ramtext"), noinline))

/* --- print.c: the console ------------------------------------------------------------------------------------ */

/* A small printf: %s, %c, %u, %d, %x (lower case, no prefix), %%; a width pads on the left, with zeros if it begins
 * with 0. Numbers are 64 bits wide: pass u64 or long. */
void print(const char *format, ...);

/* --- <isa>.c: the machine ------------------------------------------------------------------------------------- */

extern const char isa_name[];

/* Ends the guest; 0 is success. Statuses are 0..127. */
_Noreturn void guest_exit(unsigned status);

void uart_init(void);
void uart_putc(char c);

/* The next byte of input, -1 when none has arrived. */
int uart_getc(void);

/* Makes instructions just written to [start, start + size) visible to this CPU's fetches. */
void sync_code(void *start, size_t size);

/* Writes a function of two instructions that returns `value` (< 2048) to `code`, which is ordinary memory. */
void write_return(u32 code[2], u32 value);

/* Makes this CPU forget instructions it has fetched before, after another CPU has written and synchronised them. */
void sync_fetch(void);

/* A hint inside a spin loop. */
void cpu_relax(void);

/* A source of interrupts is waited for with interrupts off, or it may come between the test and the wfi:
 *     while (!done) { wait_for_interrupt(); interrupts_on(); interrupts_off(); }
 * wfi ends for one that is pending though masked. */
void interrupts_on(void);
void interrupts_off(void);
void wait_for_interrupt(void);

/* --- Traps ---------------------------------------------------------------------------------------------------- */

/* What the vectors save, in this order. The guest resumes with what the handler leaves here, but for the stack
 * pointer, which only tells what it was. */
struct trap {
    u64 regs[32]; /* arm64: x0..x30, SP_EL1; riscv64: x0..x31 (x0 unused) */
    u64 pc;
    u64 status;   /* SPSR_EL1 / mstatus */
    u64 cause;    /* ESR_EL1 / mcause */
    u64 address;  /* FAR_EL1 / mtval */
};

/* Handles an exception: true resumes at trap->pc. Without one, or after false, the trap is printed and is fatal. */
extern bool (*on_exception)(struct trap *trap);

/* Handles an interrupt; it must make the source stop asserting it. */
extern void (*on_interrupt)(void);

enum trap_kind {
    TRAP_OTHER,
    TRAP_FETCH,      /* instruction fetch from where there is no memory */
    TRAP_READ,       /* load from there */
    TRAP_WRITE,      /* store to there */
    TRAP_MISALIGNED,
    TRAP_UNDEFINED,
    TRAP_BREAKPOINT,
    TRAP_CALL,       /* svc, ecall */
    TRAP_KINDS
};

enum trap_kind trap_kind(const struct trap *trap);

/* The kind in words. */
const char *trap_name(enum trap_kind kind);

/* Makes pc that of the instruction after the one that trapped; after a fetch fault, of the caller's. */
void trap_skip(struct trap *trap);

/* Prints registers as the last words of a guest that cannot go on. */
void trap_print(const struct trap *trap);

/* --- Further CPUs --------------------------------------------------------------------------------------------- */

/* Starts CPU number `cpu` (1..MAX_CPUS-1) in entry(cpu) on a stack of its own; false if there is no such CPU. It
 * parks for good when entry returns. */
bool cpu_start(unsigned cpu, void (*entry)(unsigned cpu));

/* --- Device registers ----------------------------------------------------------------------------------------- */

static inline u32 read32(u64 address) { return *(volatile u32 *)address; }
static inline void write32(u64 address, u32 value) { *(volatile u32 *)address = value; }
static inline u8 read8(u64 address) { return *(volatile u8 *)address; }
static inline void write8(u64 address, u8 value) { *(volatile u8 *)address = value; }

/* --- sections.ld ---------------------------------------------------------------------------------------------- */

extern char __flash_end[];  /* end of what the ELF occupies in flash */
extern char __ram_free[];   /* first page of RAM that nobody uses */

#endif
