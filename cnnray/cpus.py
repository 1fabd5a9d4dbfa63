"""The CPUs of this machine that a process may use."""

import os


def usable_cpus() -> int:
    """Number of CPUs that this process may use: those of its affinity, or all where the system has none (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
