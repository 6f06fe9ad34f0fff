/*
 * start-arm64.S: reset and exceptions of an AArch64 guest at EL1, MMU off.
 *
 * Reset enters at the first byte of flash. Only the boot CPU does: others enter secondary_start when PSCI is asked
 * for them. Vectors save everything into a struct trap on the current stack.
 */
#define FRAME_SIZE 0x120 /* struct trap: 32 registers, pc, status, cause, address */

    .section .text.start, "ax"
    .global _start
_start:
    msr     daifset, #0xf
    adr     x0, vectors
    msr     vbar_el1, x0
    isb
    adrp    x0, __stack0_top
    add     x0, x0, :lo12:__stack0_top
    mov     sp, x0

    /* .data: from its place in flash to RAM. Sizes are multiples of 8 (sections.ld). */
    adrp    x0, __data_start
    add     x0, x0, :lo12:__data_start
    adrp    x1, __data_end
    add     x1, x1, :lo12:__data_end
    adrp    x2, __data_load
    add     x2, x2, :lo12:__data_load
1:  cmp     x0, x1
    b.hs    2f
    ldr     x3, [x2], #8
    str     x3, [x0], #8
    b       1b

2:  adrp    x0, __bss_start
    add     x0, x0, :lo12:__bss_start
    adrp    x1, __bss_end
    add     x1, x1, :lo12:__bss_end
3:  cmp     x0, x1
    b.hs    4f
    str     xzr, [x0], #8
    b       3b

4:  ic      iallu               /* .data may hold code */
    dsb     ish
    isb
    bl      uart_init
    bl      main
    bl      guest_exit

    /* x0: the number of this CPU, as given to CPU_ON. */
    .global secondary_start
secondary_start:
    msr     daifset, #0xf
    adr     x1, vectors
    msr     vbar_el1, x1
    isb
    adrp    x1, __stack0_top
    add     x1, x1, :lo12:__stack0_top
    add     x1, x1, x0, lsl #14 /* stacks are 16 KiB each, one after the other */
    mov     sp, x1
    bl      secondary_main
5:  wfi
    b       5b

    .macro vector is_interrupt
    .balign 0x80
    sub     sp, sp, #FRAME_SIZE
    stp     x0, x1, [sp, #0x00]
    mov     x1, #\is_interrupt
    b       save
    .endm

    /* Four groups (EL1 on SP_EL0, EL1, AArch64 EL0, AArch32 EL0) of synchronous, IRQ, FIQ, SError. */
    .balign 0x800
    .global vectors
vectors:
    .rept 4
    vector 0
    vector 1
    vector 1
    vector 0
    .endr

save:
    stp     x2, x3, [sp, #0x10]
    stp     x4, x5, [sp, #0x20]
    stp     x6, x7, [sp, #0x30]
    stp     x8, x9, [sp, #0x40]
    stp     x10, x11, [sp, #0x50]
    stp     x12, x13, [sp, #0x60]
    stp     x14, x15, [sp, #0x70]
    stp     x16, x17, [sp, #0x80]
    stp     x18, x19, [sp, #0x90]
    stp     x20, x21, [sp, #0xa0]
    stp     x22, x23, [sp, #0xb0]
    stp     x24, x25, [sp, #0xc0]
    stp     x26, x27, [sp, #0xd0]
    stp     x28, x29, [sp, #0xe0]
    add     x2, sp, #FRAME_SIZE
    stp     x30, x2, [sp, #0xf0]
    mrs     x2, elr_el1
    mrs     x3, spsr_el1
    stp     x2, x3, [sp, #0x100]
    mrs     x2, esr_el1
    mrs     x3, far_el1
    stp     x2, x3, [sp, #0x110]

    mov     x0, sp
    bl      trap_entry

    ldp     x2, x3, [sp, #0x100]
    msr     elr_el1, x2
    msr     spsr_el1, x3
    ldp     x0, x1, [sp, #0x00]
    ldp     x2, x3, [sp, #0x10]
    ldp     x4, x5, [sp, #0x20]
    ldp     x6, x7, [sp, #0x30]
    ldp     x8, x9, [sp, #0x40]
    ldp     x10, x11, [sp, #0x50]
    ldp     x12, x13, [sp, #0x60]
    ldp     x14, x15, [sp, #0x70]
    ldp     x16, x17, [sp, #0x80]
    ldp     x18, x19, [sp, #0x90]
    ldp     x20, x21, [sp, #0xa0]
    ldp     x22, x23, [sp, #0xb0]
    ldp     x24, x25, [sp, #0xc0]
    ldp     x26, x27, [sp, #0xd0]
    ldp     x28, x29, [sp, #0xe0]
    ldr     x30, [sp, #0xf0]
    add     sp, sp, #FRAME_SIZE
    eret
