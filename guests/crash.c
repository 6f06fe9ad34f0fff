/*
 * crash: a write through a wild pointer, three calls deep, that nobody handles.
 *
 * With -DVECTORS the guest's own last words come from trap.c, and its status is 1. Without, its vectors lead nowhere,
 * either, as in firmware that has not set them yet: the machine faults again on the way to the handler, and again,
 * and whoever runs it has to notice.
 */
#include "guest.h"

__attribute__((noinline)) static void store_result(u32 *result, u32 value)
{
    *(volatile u32 *)result = value;
}

__attribute__((noinline)) static void compute(u32 *result, u32 seed)
{
    store_result(result, seed * 1664525u + 1013904223u);
    print("crash: not reached\n");
}

int main(void)
{
    u32 *wild = (u32 *)NOWHERE + 0x41;

#ifndef VECTORS
#if defined(__aarch64__)
    __asm__ volatile("msr vbar_el1, %0\n\tisb" : : "r"(NOWHERE + 0x10000));
#else
    __asm__ volatile("csrw mtvec, %0" : : "r"(NOWHERE + 0x10000));
#endif
#endif
    print("crash: about to write to %08x\n", (u64)wild);
    compute(wild, 42);
    return 0;
}
