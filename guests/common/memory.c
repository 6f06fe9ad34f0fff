/* memory.c: the two functions that a compiler may call without being asked. */
#include "guest.h"

void *memset(void *to, int value, size_t size)
{
    volatile u8 *byte = to; /* volatile: or this loop is turned into a call of memset */

    while (size--)
        *byte++ = (u8)value;
    return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    volatile u8 *out = to;
    const u8 *in = from;

    while (size--)
        *out++ = *in++;
    return to;
}
