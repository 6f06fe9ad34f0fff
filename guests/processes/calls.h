/* calls.h: system calls, by number. */
#ifndef CALLS_H
#define CALLS_H

enum call {
    CALL_EXIT,    /* (status) */
    CALL_WRITE,   /* (file, buffer, size) -> written; file 1 is the console */
    CALL_READ,    /* (file, buffer, size) -> read; 0 at the end */
    CALL_FORK,    /* () -> pid, 0 in the child */
    CALL_EXEC,    /* (name, argument) */
    CALL_WAIT,    /* (pid) -> status; 0x80 + what killed it */
    CALL_PIPE,    /* (int files[2]) */
    CALL_CLOSE,   /* (file) */
    CALL_MAP,     /* (address, bytes, kind) */
    CALL_ALIAS,   /* (to, from, is code): the page at `from` at `to`, too */
    CALL_ENTRY,   /* (address) -> SEEN_* of its entry, 0 without one */
    CALL_AGE,     /* (address): its entry was not accessed, and is clean */
    CALL_YIELD,   /* () */
    CALL_SLEEP,   /* (ticks) */
    CALL_FRAMES,  /* () -> free frames */
    CALL_PREEMPTED, /* () -> how often the timer took the CPU from this process */
    CALL_KEPT_OUT, /* (address) -> whether the kernel cannot read there without meaning to */
    CALLS
};

enum { MAP_ZERO, MAP_SHARED, MAP_BLOCK };
enum { SEEN_WRITE = 1, SEEN_EXECUTE = 2, SEEN_ACCESSED = 8, SEEN_DIRTY = 16, SEEN_SHARED = 32, SEEN_BLOCK = 256 };
enum { KILLED_READ = 0x81, KILLED_WRITE, KILLED_FETCH, KILLED_UNDEFINED };

#define FAILED (~0ul)

#endif
