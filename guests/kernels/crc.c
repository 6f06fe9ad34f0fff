/* crc: CRC-32 bit by bit over 4 KiB, again and again: a loop of four instructions that touches no memory. */
#include "kernel.h"

#ifndef ROUNDS
#define ROUNDS 7000
#endif
#define SIZE 4096
#define EXPECTED 0x60318e4e /* for these ROUNDS; zlib.crc32 says the same */

static u8 data[SIZE];

int main(void)
{
    u32 crc = ~0u;

    for (u64 i = 0; i < SIZE; i++)
        data[i] = (u8)(i * 7);
    for (u64 round = 0; round < ROUNDS; round++)
        for (u64 i = 0; i < SIZE; i++) {
            crc ^= data[i];
#pragma clang loop unroll(disable)
            for (int bit = 0; bit < 8; bit++)
                crc = crc >> 1 ^ (0xedb88320u & -(crc & 1));
        }
    return kernel_end("crc", (u32)~crc, EXPECTED);
}
