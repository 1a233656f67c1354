"""Where memory does not suffice, CPU kernels raise; an exception that left a parallel region would end the program."""

import os
import subprocess
import sys

import pytest

# Each with the bytes that memory ends later at every attempt: about what a thread takes for itself, or less.
CALLS = {
    "info_nce": ("info_nce(wide, wide, backend='cpu')", 2**25),
    "info_nce backward": ("torch.autograd.grad(info_nce(leaf, wide, backend='cpu').sum(), leaf)", 2**26),
    "matting_laplacian_energy": ("matting_laplacian_energy(picture, picture, backend='cpu')", 2**24),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_raise_where_memory_ends(name):
    call, interval = CALLS[name]
    code = f"""
import resource, torch
from restoration_kernels import info_nce, matting_laplacian_energy
torch.set_num_threads(2)
wide = torch.rand(1, 2, 2**18)
leaf = wide.clone().requires_grad_()
picture = torch.rand(1, 3, 4, 2**18)

def call():
    {call}

call()  # wakes the threads, which could not be started later
refused, step = 0, 0
while refused == step:
    with open("/proc/self/statm") as status:
        pages = int(status.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + step * {interval}, resource.RLIM_INFINITY))
    try:
        call()
    except (MemoryError, RuntimeError):  # of the kernel, of torch
        refused += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    step += 1
assert refused > 1
"""
    # The C library then keeps no memory for later calls.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
