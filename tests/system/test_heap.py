"""What a process frees stays with it, so that asking again costs no page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from csqcli.system.heap import keep_freed_memory

FAULTS_OF_A_SECOND_TIME = """
import ctypes, resource
from csqcli.system.heap import keep_freed_memory
if {keep}: assert keep_freed_memory({{}})
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def once():
    block = libc.malloc({size})
    ctypes.memset(block, 1, {size})
    libc.free(block)
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
linux = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="needs glibc",
)


def faults(size: int, *, keep: bool) -> int:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))
    }
    code = FAULTS_OF_A_SECOND_TIME.format(keep=keep, size=size)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@linux
def test_a_block_that_was_freed_is_there_at_once_the_second_time() -> None:
    size = 100 * 2**20
    pages = size // os.sysconf("SC_PAGESIZE")
    assert faults(size, keep=True) < pages / 100
    assert (
        faults(size, keep=False) > faults(size, keep=True) * 2 + 20
    )  # fewer than pages where the system maps huge ones


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_who_sets_malloc_up_is_left_alone(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
