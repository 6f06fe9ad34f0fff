/* matrix: products of 64x64 matrices of words: two loads, a multiplication and an addition each step. */
#include "kernel.h"

#ifndef ROUNDS
#define ROUNDS 500
#endif
#define N 64
#define EXPECTED 0xfa295c0 /* for these ROUNDS */

static u32 a[N][N], b[N][N], c[N][N];

int main(void)
{
    u32 sum = 0;

    for (u32 i = 0; i < N; i++)
        for (u32 j = 0; j < N; j++) {
            a[i][j] = i * 3 + j;
            b[i][j] = i ^ j * 5;
        }
    for (u32 round = 0; round < ROUNDS; round++) {
        a[round % N][0] = round;
        for (u32 i = 0; i < N; i++)
            for (u32 j = 0; j < N; j++) {
                u32 dot = 0;
                for (u32 k = 0; k < N; k++)
                    dot += a[i][k] * b[k][j];
                c[i][j] = dot;
            }
        BARRIER();
        for (u32 i = 0; i < N; i++)
            sum += c[i][i] * (i + 1);
    }
    return kernel_end("matrix", sum, EXPECTED);
}
