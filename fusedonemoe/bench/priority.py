"""Real-time priority for the threads of this process."""

import os


class RealTime:
    """Runs the threads of this process round-robin at real-time priority, where that is permitted, and puts them back.

    Without it, whatever else the machine does lands in the timings: on a busy machine medians come out doubled.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.wanted: bool = wanted and hasattr(os, "sched_setscheduler") and os.path.isdir("/proc/self/task")
        self.granted: bool = False
        self._before: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> "RealTime":
        if self.wanted:
            self._before = {t: (os.sched_getscheduler(t), os.sched_getparam(t).sched_priority) for t in _threads()}
            # Every thread is moved before the answers are looked at.
            answers = [_schedule(thread, os.SCHED_RR, 1) for thread in self._before]
            self.granted = all(answers)
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that was started meanwhile inherited the priority; it goes where the main thread goes.
        usual = self._before.get(os.getpid(), (0, 0))
        for thread in _threads() if self._before else ():
            _schedule(thread, *self._before.get(thread, usual))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _schedule(thread: int, policy: int, priority: int) -> bool:
    """Set a thread's policy; True when it is set, or the thread has ended in the meantime."""
    try:
        os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True
