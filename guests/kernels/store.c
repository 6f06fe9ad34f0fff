/* store: a stream of 8-byte stores over 256 KiB, again and again. Nothing is read until the end. */
#include "kernel.h"

#ifndef ROUNDS
#define ROUNDS 3072
#endif
#define WORDS (256 * 1024 / sizeof(u64))

static u64 buffer[WORDS];

int main(void)
{
    u64 sum = 0;

    for (u64 round = 1; round <= ROUNDS; round++) {
        for (u64 i = 0; i < WORDS; i++)
            buffer[i] = i + round;
        BARRIER();
    }
    for (u64 i = 0; i < WORDS; i++)
        sum += buffer[i];
    return kernel_end("store", sum, (u64)ROUNDS * WORDS + (u64)WORDS * (WORDS - 1) / 2);
}
