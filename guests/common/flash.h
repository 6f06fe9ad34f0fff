/*
 * flash.h: a driver for the boards' CFI NOR banks, command set 0x0001: two x16 chips side by side.
 *
 * The functions run in RAM and work on the bank that everything else, the vectors included, is executed from: from
 * their first write to their last the bank answers with status words and not with its array. Interrupts stay masked,
 * and what the functions are given to read must lie in RAM.
 */
#ifndef FLASH_H
#define FLASH_H

#include "guest.h"

/* Erases the sector at `sector`; true if no chip reports an error. */
bool flash_erase(u64 sector);

/* Programs `count` words at `address`, which can only turn ones into zeros; true if no chip reports an error. The
 * caller does sync_code() if they are instructions. */
bool flash_program(u64 address, const u32 *words, size_t count);

#endif
