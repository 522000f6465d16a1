"""Settings of the C libraries below torch that training on a CPU depends on."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_SPINS = "2000"  # some 50 µs
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h
_KEPT_BYTES = 512 * 2**20
_OPEN_FILES = 65536
_LARGEST_FROM_HEAP_BYTES = 32 * 2**20  # the largest value that mallopt takes


def prepare_process() -> None:
    """To be called before torch is imported; what the user set in the environment stays.

    Idle threads look for work some 50 µs, then sleep. With GNU OpenMP's default of milliseconds they starve the processes beside them; asleep
    at once, each of the many short operations of a training step waits 0.1 ms for them, which made a student's step 1.7 times as long.

    Freed memory stays with the process, up to 512 MB of it (glibc only): else every step gets its pages anew, zeroed.

    As many files may be open as the system lets the user ask for: the parts of a large split are open all at once.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    with suppress(ImportError, OSError, ValueError):
        import resource  # on Unix

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
