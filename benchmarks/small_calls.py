"""``python -m benchmarks.small_calls``: every GPU kernel on small samples, for a tool that watches it (gpu_check.py).

Such a tool makes a kernel a hundred times slower, and what it looks for, an access out of bounds or a missing barrier,
shows on small shapes too. Whether the results are right is for the tests to say.
"""

import torch
from compare import DIFFERENTIABLE, differentiate, public

from restoration_kernels._backend import OPERATORS
from restoration_kernels._samples import samples


def main():
    """Runs forward and backward; prints how many calls there were of each operator and backend."""
    for backend in ("cuda", "triton"):
        # Triton's tuning would run every kernel many times over; a fixed order needs none. Memory is left unfilled.
        torch.use_deterministic_algorithms(backend == "triton", warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        for operator in OPERATORS:
            print(f"{operator} on {backend}: {_calls(operator, backend)} calls", flush=True)


def _calls(operator, backend):
    count = 0
    for sample in samples(operator, "tiny", "odd"):
        for dtype in (torch.float32, torch.float16):
            arguments = sample.arguments(dtype, "cuda")
            if OPERATORS[operator].why_not(backend, **arguments) is None:
                differentiate(public(operator, backend), arguments, DIFFERENTIABLE.get(operator, ()))
                count += 1
    torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    main()
