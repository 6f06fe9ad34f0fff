/* kernel.h: how every kernel ends, and the pseudo-random numbers that some of them work on. */
#ifndef KERNEL_H
#define KERNEL_H

#include "guest.h"

/* Keeps the compiler from carrying stores over, or leaving out, what one round has written. */
#define BARRIER() __asm__ volatile("" : : : "memory")

/* Prints the result and returns main()'s status: 0 only if it is the right one. */
static inline int kernel_end(const char *name, u64 result, u64 expected)
{
    print("%s: %x %s\n", name, result, result == expected ? "ok" : "WRONG");
    return result == expected ? 0 : 1;
}

/* Numerical Recipes' generator; the high half is what is random. */
static inline u32 next_random(u32 *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

#endif
