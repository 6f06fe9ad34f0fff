/*
 * environment.S: what lies under every conformance program.
 *
 * M-mode opens memory to user mode, goes there, and the program runs. It ends with an ecall and gp = 1 if all its
 * cases passed, or (case << 1 | 1); a trap of any other kind fails the case that gp numbers. Either way gp is stored
 * to `tohost`, whose watcher ends the run.
 */
#define CAUSE_ECALL_FROM_U 8
#define PMP_ALL 0x1f            /* NAPOT, RWX */

    .section .text.init, "awx"
    .globl _start
_start:
    csrr    t0, mhartid
1:  bnez    t0, 1b              /* one hart is enough */
    la      t0, trap
    csrw    mtvec, t0
    li      t0, -1
    csrw    pmpaddr0, t0
    li      t0, PMP_ALL
    csrw    pmpcfg0, t0
    csrw    mstatus, zero       /* MPP = U */
    la      t0, program
    csrw    mepc, t0
    li      gp, 0
    mret

    .balign 4
trap:
    csrr    t5, mcause
    li      t6, CAUSE_ECALL_FROM_U
    beq     t5, t6, 2f
    slli    gp, gp, 1
    ori     gp, gp, 1
    li      t5, 1               /* a trap in no case at all is no success, either */
    bne     gp, t5, 2f
    li      gp, 3
2:  la      t5, tohost
3:  sw      gp, 0(t5)
    sw      zero, 4(t5)
    j       3b

    .globl pass
pass:
    li      gp, 1
    ecall

    .globl fail
fail:
    slli    gp, gp, 1
    ori     gp, gp, 1
    ecall

    .section .tohost, "aw"
    .balign 64
    .globl tohost
    .type tohost, @object
    .size tohost, 8
tohost:
    .dword  0
    .balign 64
    .globl fromhost
    .type fromhost, @object
    .size fromhost, 8
fromhost:
    .dword  0
