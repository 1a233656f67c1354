"""``python -m restoration_kernels``: which operator runs on which backend here, or why not."""

import sys

import torch

from . import _checks
from ._backend import BACKENDS, OPERATORS, _ambient_wish, extension
from ._samples import samples


def main():
    """Prints the table, or what is wrong with the environment, with exit status 2."""
    try:
        wish, source = _ambient_wish()
        if wish is not None:
            _checks.backend("restoration_kernels", wish, source, BACKENDS)
        extension()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"torch {torch.__version__}, CUDA devices: {torch.cuda.device_count()}")
    print(f"compiled extension: {_describe_extension()}")
    width = max(map(len, OPERATORS))
    for name, operator in OPERATORS.items():
        for backend in BACKENDS:
            on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
            arguments = samples(name)[0].arguments(device="cuda" if on_gpu else "cpu")
            print(f"{name:{width}}  {backend:9}  {operator.why_not(backend, **arguments) or 'available'}")


def _describe_extension():
    module, reason = extension()
    if module is None:
        return reason
    # Empty is what was left out.
    facts = {name.replace("_", " "): value or "none" for name, value in module.build_info().items()}
    return ", ".join(f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in facts.items())


if __name__ == "__main__":
    main()
