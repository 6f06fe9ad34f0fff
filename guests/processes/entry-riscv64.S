/*
 * entry-riscv64.S: reset in M-mode, a machine monitor that only keeps the timer, and the traps of S-mode.
 *
 * M-mode runs untranslated, from where the code is stored; S-mode runs the same flash at KERNEL_BASE. In a process
 * sscratch points to its registers, in the kernel it is 0.
 */
#define FRAME_SIZE 0x120 /* struct trap */
#define MTIMECMP 0x02004000
#define MTIME 0x0200bff8
#define FINISHER 0x00100000

    .section .text.start, "ax"
    .global _start
_start:
    csrw    mie, zero
    csrci   mstatus, 8
    bnez    a0, park
    la      t0, machine_trap
    csrw    mtvec, t0
    la      t0, machine_scratch
    csrw    mscratch, t0
    li      t0, -1
    csrw    pmpaddr0, t0
    li      t0, 0x1f            /* NAPOT, RWX */
    csrw    pmpcfg0, t0
    li      t0, 0xb1ff          /* all but calls of S-mode */
    csrw    medeleg, t0
    li      t0, 0x222
    csrw    mideleg, t0

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

4:  la      sp, __stack_top
    call    boot_tables         /* a0: satp */
    li      t0, 0x1800
    csrc    mstatus, t0
    li      t0, 0x0800          /* MPP: S */
    csrs    mstatus, t0
    la      t0, supervisor
    li      t1, 0xffffffc000000000
    add     t0, t0, t1
    csrw    mepc, t0
    csrw    satp, a0
    sfence.vma
    mret

park:
    wfi
    j       park

supervisor:
    csrw    sscratch, zero
    la      t0, trap_vector
    csrw    stvec, t0
    la      sp, __stack_top
    call    main

    /* A call of S-mode: the timer shall fire in a0 ticks. Its interrupt goes to S-mode by STIP. */
    .balign 4
machine_trap:
    csrrw   sp, mscratch, sp
    sd      t0, 0(sp)
    sd      t1, 8(sp)
    csrr    t0, mcause
    bltz    t0, 1f
    li      t1, 9               /* a call of S-mode */
    bne     t0, t1, 2f
    li      t0, MTIME
    ld      t0, 0(t0)
    add     t0, t0, a0
    li      t1, MTIMECMP
    sd      t0, 0(t1)
    li      t0, 0x20            /* STIP */
    csrc    mip, t0
    li      t0, 0x80            /* MTIE */
    csrs    mie, t0
    csrr    t0, mepc
    addi    t0, t0, 4
    csrw    mepc, t0
    j       3f
1:  li      t0, 0x80
    csrc    mie, t0
    li      t0, 0x20
    csrs    mip, t0
3:  ld      t0, 0(sp)
    ld      t1, 8(sp)
    csrrw   sp, mscratch, sp
    mret
2:  li      t0, FINISHER
    li      t1, 0x7f3333
    sw      t1, 0(t0)
    j       park

    .balign 4
trap_vector:
    csrrw   x31, sscratch, x31
    beqz    x31, of_kernel
    .irp    n, 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    sd      x\n, 8*\n(x31)
    .endr
    csrrw   t0, sscratch, zero
    sd      t0, 8*31(x31)
    csrr    t0, sepc
    csrr    t1, sstatus
    csrr    t2, scause
    csrr    t3, stval
    sd      t0, 0x100(x31)
    sd      t1, 0x108(x31)
    sd      t2, 0x110(x31)
    sd      t3, 0x118(x31)
    la      sp, __stack_top
    mv      a0, x31
    srli    a1, t2, 63
    call    trap_of_user

    .global return_to_user
return_to_user:
    mv      x31, a0
    ld      t0, 0x100(x31)
    ld      t1, 0x108(x31)
    csrw    sepc, t0
    csrw    sstatus, t1
    csrw    sscratch, x31
    .irp    n, 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    ld      x\n, 8*\n(x31)
    .endr
    ld      x31, 8*31(x31)
    sret

    /* Only copies fault here. A copy that cannot go on answers 0. */
of_kernel:
    csrrw   x31, sscratch, x31
    addi    sp, sp, -FRAME_SIZE
    .irp    n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    sd      x\n, 8*\n(sp)
    .endr
    csrr    t0, sepc
    csrr    t1, sstatus
    csrr    t2, scause
    csrr    t3, stval
    sd      t0, 0x100(sp)
    sd      t1, 0x108(sp)
    sd      t2, 0x110(sp)
    sd      t3, 0x118(sp)
    mv      a0, sp
    la      t1, copy_begin
    la      t2, copy_end
    sltu    t1, t0, t1
    sltu    t2, t0, t2
    xori    t1, t1, 1
    and     a1, t1, t2
    call    trap_of_kernel
    ld      t0, 0x100(sp)
    bnez    a0, 1f
    la      t0, copy_failed
1:  ld      t1, 0x108(sp)
    csrw    sepc, t0
    csrw    sstatus, t1
    .irp    n, 1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld      x\n, 8*\n(sp)
    .endr
    addi    sp, sp, FRAME_SIZE
    sret

    /* a0: to, a1: from, a2: size -> a0: 1, or 0 after a fault */
    .global copy_bytes
copy_bytes:
    li      t1, 1 << 18         /* SUM */
    csrs    sstatus, t1
copy_begin:
1:  beqz    a2, 2f
    lbu     t0, 0(a1)
    sb      t0, 0(a0)
    addi    a0, a0, 1
    addi    a1, a1, 1
    addi    a2, a2, -1
    j       1b
2:  csrc    sstatus, t1
    li      a0, 1
    ret
copy_failed:
    li      t1, 1 << 18
    csrc    sstatus, t1
    li      a0, 0
    ret
    /* a0: address -> a0: 1 when it can be read as the kernel's own, which only copy_failed can answer */
    .global read_byte
read_byte:
    lbu     t0, 0(a0)
copy_end:
    li      a0, 1
    ret

    .bss
    .balign 16
machine_scratch:
    .space  16
