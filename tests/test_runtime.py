"""What a process sets before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, resource
from asr_kd.runtime import prepare_process
prepare_process()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():  # 40 MB are written, then freed from the end of the heap on
    blocks = [libc.malloc(8_000_000) for _ in range(5)]
    for block in blocks:
        ctypes.memset(block, 1, 8_000_000)
    for block in reversed(blocks):
        libc.free(block)
step()
before = faults()
for _ in range(10):
    step()
print(os.environ["GOMP_SPINCOUNT"], faults() - before)
"""


def outcome(**environment: str) -> tuple[str, int]:
    """Spin count and page faults of ten steps in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "MALLOC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**clean, **environment}, capture_output=True, text=True, check=True)
    spins, faults = done.stdout.split()
    return spins, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_used_again() -> None:
    spins, faults = outcome()
    assert spins == "2000"
    assert faults < 1000  # the system's pages, 4 kB each, would be 97,000


@pytest.mark.skipif(sys.platform != "linux", reason="limits of open files are set as on Linux")
def test_as_many_files_as_allowed_may_be_open() -> None:
    script = ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300)); from asr_kd.runtime import prepare_process; prepare_process(); "
              "print(resource.getrlimit(resource.RLIMIT_NOFILE))")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "(300, 300)\n"


def test_the_environment_goes_first() -> None:
    spins, faults = outcome(GOMP_SPINCOUNT="7", MALLOC_TRIM_THRESHOLD_="131072")
    assert spins == "7"
    assert sys.platform != "linux" or faults > 10_000
