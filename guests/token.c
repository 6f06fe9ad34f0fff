/* token: all CPUs pass a token round through memory. Whoever has it adds to a sum that no lock protects. */
#include "guest.h"

#define ROUNDS 100

static volatile u64 cpus; /* 0 until all have been started */
static volatile u64 token;
static u64 sum;

static void play(unsigned cpu)
{
    while (cpus == 0)
        cpu_relax();
    for (u64 turn = cpu; turn < ROUNDS * cpus; turn += cpus) {
        while (__atomic_load_n(&token, __ATOMIC_ACQUIRE) != turn)
            cpu_relax();
        sum += turn;
        __atomic_store_n(&token, turn + 1, __ATOMIC_RELEASE);
    }
}

int main(void)
{
    u64 started = 1;

    while (started < MAX_CPUS && cpu_start((unsigned)started, play))
        started++;
    cpus = started;
    play(0);
    while (__atomic_load_n(&token, __ATOMIC_ACQUIRE) != ROUNDS * cpus)
        cpu_relax();

    u64 passes = ROUNDS * started;
    bool good = sum == passes * (passes - 1) / 2;
    print("token: %u cpus, %u passes, sum %u %s\n", started, passes, sum, good ? "ok" : "WRONG");
    if (started == 1)
        print("token: it never left the only CPU (--smp 2)\n");
    return good ? 0 : 1;
}
