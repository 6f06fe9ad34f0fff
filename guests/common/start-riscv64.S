/*
 * start-riscv64.S: reset and traps of an RV64 guest in M-mode.
 *
 * Every hart enters at the first byte of flash with a0 = its number. Hart 0 is the boot hart; the others sleep until
 * a software interrupt sends them into secondary_main. The trap vector saves everything into a struct trap on the
 * current stack.
 */
#define FRAME_SIZE 0x120 /* struct trap: 32 registers, pc, status, cause, address */
#define MIE_MSIE (1 << 3)

    .section .text.start, "ax"
    .global _start
_start:
    csrw    mie, zero
    csrci   mstatus, 8          /* MIE off */
    la      t0, trap_vector
    csrw    mtvec, t0
    la      sp, __stack0_top
    slli    t0, a0, 14          /* stacks are 16 KiB each, one after the other */
    add     sp, sp, t0
    bnez    a0, park

    /* .data: from its place in flash to RAM. Sizes are multiples of 8 (sections.ld). */
    la      t0, __data_start
    la      t1, __data_end
    la      t2, __data_load
1:  bgeu    t0, t1, 2f
    ld      t3, 0(t2)
    sd      t3, 0(t0)
    addi    t0, t0, 8
    addi    t2, t2, 8
    j       1b

2:  la      t0, __bss_start
    la      t1, __bss_end
3:  bgeu    t0, t1, 4f
    sd      zero, 0(t0)
    addi    t0, t0, 8
    j       3b

4:  fence.i                     /* .data may hold code */
    call    uart_init
    call    main
    call    guest_exit

park:
    mv      s0, a0
5:  csrwi   mie, MIE_MSIE       /* wfi wakes for what mie enables, though mstatus.MIE is off */
    wfi
    csrr    t0, mip
    andi    t0, t0, MIE_MSIE
    beqz    t0, 5b
    csrw    mie, zero
    fence.i
    mv      a0, s0
    call    secondary_main
    j       5b

    .balign 4
trap_vector:
    addi    sp, sp, -FRAME_SIZE
    .irp    n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    sd      x\n, 8*\n(sp)
    .endr
    addi    t0, sp, FRAME_SIZE
    sd      zero, 0(sp)
    sd      t0, 16(sp)          /* x2: the stack pointer as it was */
    csrr    t0, mepc
    csrr    t1, mstatus
    csrr    t2, mcause
    csrr    t3, mtval
    sd      t0, 0x100(sp)
    sd      t1, 0x108(sp)
    sd      t2, 0x110(sp)
    sd      t3, 0x118(sp)

    mv      a0, sp
    srli    a1, t2, 63          /* interrupts have the top bit of mcause set */
    call    trap_entry

    ld      t0, 0x100(sp)
    ld      t1, 0x108(sp)
    csrw    mepc, t0
    csrw    mstatus, t1
    .irp    n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld      x\n, 8*\n(sp)
    .endr
    addi    sp, sp, FRAME_SIZE
    mret
