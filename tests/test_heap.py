import platform
import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from cellray import heap

assert sys.argv[1] == "as it is" or heap.keep()

def use():
    return len([b"x" * (10 << 20) for _ in range(8)])

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Pages that come from the system anew while 80 MB are made ten times."""
    found = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_used_again() -> None:
    pages = 10 * (80 << 20) // resource.getpagesize()
    assert faults("as it is") > 0.5 * pages
    assert faults("kept") < 0.01 * pages
