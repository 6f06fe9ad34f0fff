"""Signals while a guest runs: they kick the vCPU instead of interrupting Python."""

cdef Hot *current = NULL            # the engine that runs now, for the signal handler
cdef uint32_t pending_signals = 0   # bit of each signal number seen since take_signals()


cdef void _on_signal(int signum) noexcept nogil:
    global pending_signals
    pending_signals |= (<uint32_t>1) << signum
    cdef Hot *hot = current
    if hot == NULL:
        return
    _kick(hot, C_KICK_SIGNAL)


cdef void _kick(Hot *hot, uint32_t why) noexcept nogil:
    """Has the engine leave the guest at the next block start."""
    hot.kick |= why
    if hot.running and not hot.polled:  # else the block hook sees it
        api.emu_stop(hot.uc)


cdef double tick_interval = 0.0


cdef void _next_tick(double seconds) noexcept nogil:
    cdef itimerval timer
    timer.it_value.tv_sec = <long>seconds
    timer.it_value.tv_usec = <long>((seconds - <long>seconds) * 1000000)
    timer.it_interval.tv_sec = <long>tick_interval
    timer.it_interval.tv_usec = <long>((tick_interval - <long>tick_interval) * 1000000)
    setitimer(ITIMER_REAL, &timer, NULL)


def tick_in(double seconds):
    """Has the next tick come in ``seconds`` at the latest, where signals are guarded; the ones after as before."""
    cdef itimerval left
    if tick_interval > 0:
        getitimer(ITIMER_REAL, &left)
        if seconds < left.it_value.tv_sec + left.it_value.tv_usec * 1e-6:
            _next_tick(max(seconds, 20e-6))


def take_signals():
    """The set of signal numbers that arrived since the last call."""
    global pending_signals
    cdef uint32_t seen = pending_signals
    pending_signals = 0
    return {n for n in range(32) if seen >> n & 1}


cdef class SignalGuard:
    """While open, SIGINT, SIGTERM and a periodic SIGALRM kick the running vCPU; before and after, they are Python's."""

    cdef sigaction_s old_int, old_term, old_alrm
    cdef itimerval old_timer
    cdef double interval

    def __init__(self, double interval):
        self.interval = interval

    def __enter__(self):
        cdef sigaction_s act
        memset(&act, 0, sizeof(act))
        act.sa_handler = _on_signal
        sigemptyset(&act.sa_mask)
        act.sa_flags = SA_RESTART
        sigaction(SIGINT, &act, &self.old_int)
        sigaction(SIGTERM, &act, &self.old_term)
        sigaction(SIGALRM, &act, &self.old_alrm)
        self._tick(self.interval)
        return self

    cdef void _tick(self, double interval):
        global tick_interval
        cdef itimerval timer
        tick_interval = interval
        timer.it_value.tv_sec = timer.it_interval.tv_sec = <long>interval
        timer.it_value.tv_usec = timer.it_interval.tv_usec = <long>((interval - <long>interval) * 1000000)
        setitimer(ITIMER_REAL, &timer, &self.old_timer if interval > 0 else NULL)

    def __exit__(self, *exc):
        self._tick(0.0)
        sigaction(SIGALRM, &self.old_alrm, NULL)
        # A timer of the process around goes on with what it had left: it stood still meanwhile.
        if self.old_timer.it_value.tv_sec or self.old_timer.it_value.tv_usec:
            setitimer(ITIMER_REAL, &self.old_timer, NULL)
        sigaction(SIGTERM, &self.old_term, NULL)
        sigaction(SIGINT, &self.old_int, NULL)
        return False
