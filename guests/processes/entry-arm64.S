/*
 * entry-arm64.S: reset at EL1 with the MMU off, the way into the upper half, and the vectors.
 *
 * In a process TPIDR_EL1 points to its registers, and SP_EL1 is the empty kernel stack.
 */
#define FRAME_SIZE 0x120 /* struct trap; regs[31] is SP_EL0 */

    .macro address register, symbol
    adrp    \register, \symbol
    add     \register, \register, :lo12:\symbol
    .endm

    .section .text.start, "ax"
    .global _start
_start:
    msr     daifset, #0xf
    address x0, __data_start
    address x1, __data_end
    address x2, __data_load
1:  cmp     x0, x1
    b.hs    2f
    ldr     x3, [x2], #8
    str     x3, [x0], #8
    b       1b
2:  address x0, __bss_start
    address x1, __bss_end
3:  cmp     x0, x1
    b.hs    4f
    str     xzr, [x0], #8
    b       3b

4:  address x0, __stack_top
    mov     sp, x0
    bl      boot_tables         /* x0: the table for both halves */
    ldr     x1, =0x0044ff       /* write-back, non-cacheable, Device-nGnRnE */
    msr     mair_el1, x1
    ldr     x1, =(25 | 25 << 16 | 2 << 30 | 1 << 32 | 1 << 36) /* 39 bits each, 4 KiB, 36 bits physical, ASIDs of 16 */
    msr     tcr_el1, x1
    msr     ttbr0_el1, x0
    msr     ttbr1_el1, x0
    dsb     sy
    tlbi    vmalle1
    dsb     sy
    isb
    mrs     x0, sctlr_el1
    ldr     x1, =(1 | 1 << 19 | 1 << 26) /* M, WXN, UCI */
    orr     x0, x0, x1
    msr     sctlr_el1, x0
    isb
    mov     x1, #0xffffffc000000000
    adr     x0, upper
    add     x0, x0, x1
    br      x0
upper:
    address x0, __stack_top
    mov     sp, x0
    address x0, vectors
    msr     vbar_el1, x0
    isb
    bl      main

    .macro unexpected
    .balign 0x80
    mov     x0, #0
    b       no_way
    .endm

    .macro from_user is_interrupt
    .balign 0x80
    stp     x0, x1, [sp, #-16]!
    mov     x1, #\is_interrupt
    b       of_user
    .endm

    .balign 0x800
vectors:
    .rept 4
    unexpected
    .endr
    .balign 0x80
    sub     sp, sp, #FRAME_SIZE
    b       of_kernel
    .rept 3
    unexpected
    .endr
    from_user 0
    from_user 1
    .rept 6
    unexpected
    .endr

no_way:
    adr     x0, what
    mov     x1, #0
    bl      panic
what:
    .asciz "a trap that should not be"
    .balign 4

    .macro save_most base
    stp     x2, x3, [\base, #0x10]
    stp     x4, x5, [\base, #0x20]
    stp     x6, x7, [\base, #0x30]
    stp     x8, x9, [\base, #0x40]
    stp     x10, x11, [\base, #0x50]
    stp     x12, x13, [\base, #0x60]
    stp     x14, x15, [\base, #0x70]
    stp     x16, x17, [\base, #0x80]
    stp     x18, x19, [\base, #0x90]
    stp     x20, x21, [\base, #0xa0]
    stp     x22, x23, [\base, #0xb0]
    stp     x24, x25, [\base, #0xc0]
    stp     x26, x27, [\base, #0xd0]
    stp     x28, x29, [\base, #0xe0]
    str     x30, [\base, #0xf0]
    mrs     x2, elr_el1
    mrs     x3, spsr_el1
    stp     x2, x3, [\base, #0x100]
    mrs     x2, esr_el1
    mrs     x3, far_el1
    stp     x2, x3, [\base, #0x110]
    .endm

    .macro restore_most base
    ldp     x2, x3, [\base, #0x100]
    msr     elr_el1, x2
    msr     spsr_el1, x3
    ldp     x2, x3, [\base, #0x10]
    ldp     x4, x5, [\base, #0x20]
    ldp     x6, x7, [\base, #0x30]
    ldp     x8, x9, [\base, #0x40]
    ldp     x10, x11, [\base, #0x50]
    ldp     x12, x13, [\base, #0x60]
    ldp     x14, x15, [\base, #0x70]
    ldp     x16, x17, [\base, #0x80]
    ldp     x18, x19, [\base, #0x90]
    ldp     x20, x21, [\base, #0xa0]
    ldp     x22, x23, [\base, #0xb0]
    ldp     x24, x25, [\base, #0xc0]
    ldp     x26, x27, [\base, #0xd0]
    ldp     x28, x29, [\base, #0xe0]
    ldr     x30, [\base, #0xf0]
    .endm

of_user:
    mrs     x0, tpidr_el1
    save_most x0
    mrs     x2, sp_el0
    str     x2, [x0, #0xf8]
    ldp     x2, x3, [sp], #16
    stp     x2, x3, [x0]
    bl      trap_of_user

    .global return_to_user
return_to_user:
    msr     tpidr_el1, x0
    ldr     x2, [x0, #0xf8]
    msr     sp_el0, x2
    address x2, __stack_top
    mov     sp, x2
    restore_most x0
    ldp     x0, x1, [x0]
    eret

    /* Only copies fault here. A copy that cannot go on answers 0. */
of_kernel:
    stp     x0, x1, [sp]
    save_most sp
    mov     x0, sp
    ldr     x2, [sp, #0x100]
    address x3, copy_begin
    address x4, copy_end
    cmp     x2, x3
    ccmp    x2, x4, #2, hs      /* below copy_begin: as if not below copy_end */
    cset    x1, lo
    bl      trap_of_kernel
    cbnz    x0, 1f
    address x0, copy_failed
    str     x0, [sp, #0x100]
1:  restore_most sp
    ldp     x0, x1, [sp]
    add     sp, sp, #FRAME_SIZE
    eret

    /* x0: to, x1: from, x2: size -> x0: 1, or 0 after a fault. The user's end with the user's rights. */
    .global copy_in, copy_out
copy_begin:
copy_in:
    cbz     x2, 2f
    ldtrb   w3, [x1]
    strb    w3, [x0], #1
    add     x1, x1, #1
    sub     x2, x2, #1
    b       copy_in
copy_out:
    cbz     x2, 2f
    ldrb    w3, [x1], #1
    sttrb   w3, [x0]
    add     x0, x0, #1
    sub     x2, x2, #1
    b       copy_out
copy_end:
2:  mov     x0, #1
    ret
copy_failed:
    mov     x0, #0
    ret
