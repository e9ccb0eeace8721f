"""Freed memory stays with the process while that is wanted, and not afterwards."""

import subprocess
import sys

import pytest

CHILD = """
import torch
from gangline.core.freed_memory import freed_memory_kept

SIZE = 256 << 20


def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


before = resident()
with freed_memory_kept() as done:
    blocks = [torch.ones(SIZE // 16, dtype=torch.uint8) for _ in range(16)]
    del blocks
    kept = resident() - before
after = resident() - before
print(int(done), int(kept > SIZE // 2), int(after > SIZE // 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kept_inside_and_given_back_after() -> None:
    """In a process of its own: what this one has freed before could be used again."""
    found = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    done, kept, after = map(int, found.stdout.split())
    assert kept == done
    assert not after
