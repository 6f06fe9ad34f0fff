/* upper.c: from one pipe to another, in capitals. The argument: the files to read and to write, and two to close. */
#include "user.h"

u64 program(u64 argument)
{
    u64 from = argument & 0xff, to = argument >> 8 & 0xff, got;
    u8 bytes[37];

    call(CALL_CLOSE, argument >> 16 & 0xff, 0, 0);
    call(CALL_CLOSE, argument >> 24 & 0xff, 0, 0);
    while ((got = call(CALL_READ, from, (u64)bytes, sizeof(bytes))) != 0) {
        if (got == FAILED)
            return 1;
        for (u64 n = 0; n < got; n++)
            bytes[n] -= 'a' - 'A';
        for (u64 n = 0; n < got;)
            n += call(CALL_WRITE, to, (u64)&bytes[n], got - n);
    }
    return 0;
}
