/* sort: quicksort of 64 Ki pseudo-random words, several times. Loads, stores and branches that nobody can predict. */
#include "kernel.h"

#ifndef ROUNDS
#define ROUNDS 30
#endif
#define WORDS 65536

static u32 words[WORDS];

/* Hoare's partition; recursion goes into the smaller part, so that 16 levels of stack are enough. */
static void quicksort(u32 *low, u32 *high)
{
    while (low < high) {
        u32 pivot = low[(high - low) / 2];
        u32 *left = low - 1;
        u32 *right = high + 1;

        for (;;) {
            while (*++left < pivot)
                ;
            while (*--right > pivot)
                ;
            if (left >= right)
                break;
            u32 swap = *left;
            *left = *right;
            *right = swap;
        }
        if (right - low < high - right) {
            quicksort(low, right);
            low = right + 1;
        } else {
            quicksort(right + 1, high);
            high = right;
        }
    }
}

int main(void)
{
    u32 seed = 1;
    u64 descents = 0;

    for (u64 round = 0; round < ROUNDS; round++) {
        for (u64 i = 0; i < WORDS; i++)
            words[i] = next_random(&seed);
        quicksort(words, words + WORDS - 1);
        for (u64 i = 1; i < WORDS; i++)
            descents += words[i - 1] > words[i];
    }
    return kernel_end("sort", descents, 0);
}
