/* user.h: what programs have. */
#ifndef USER_H
#define USER_H

#include "calls.h"
#include "guest.h"

u64 call(enum call number, u64 a, u64 b, u64 c);
u64 program(u64 argument); /* what it returns is its exit status */
void flush_output(void);

#define HASH_BEGIN 0xcbf29ce484222325ul
static inline u64 hash(u64 so_far, u64 value) { return (so_far ^ value) * 0x100000001b3ul; }

#endif
