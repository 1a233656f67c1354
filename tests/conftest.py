"""Settings that hold for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty then gives NaN, so that an output nobody wrote is seen; warn_only, as some torch operators object."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
