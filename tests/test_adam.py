"""Adam against torch.optim's, and without what that imports."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from restoration.adam import Adam

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def parameters(device):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in ((5, 3), (7,), (), (2, 4, 3, 3))]


def give_gradients(own, theirs, step):
    """To all but the first, which takes part from the second step on."""
    torch.manual_seed(1 + step)
    for index, (one, other) in enumerate(zip(own, theirs, strict=True)):
        gradient = torch.randn_like(one) if index or step else None
        one.grad, other.grad = (None if gradient is None else gradient.clone() for _ in range(2))


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_those_of_torch(device):
    """To the bit, with divided gradients, changing rates, skipped steps, and after loading what was kept."""
    own, theirs = parameters(device), parameters(device)
    optimizer = Adam(own, torch.tensor(0.1, device=device))
    expected = torch.optim.Adam(theirs, lr=torch.tensor(0.1, device=device), fused=True, capturable=device == "cuda")
    for step, (divisor, skipped) in enumerate(((1.0, 0.0), (3.0, 0.0), (2.0, 1.0), (1.0, 0.0))):
        give_gradients(own, theirs, step)
        rate = 0.1 / (step + 1)
        optimizer.learning_rate.fill_(rate)
        expected.param_groups[0]["lr"].fill_(rate)
        expected.grad_scale, expected.found_inf = torch.tensor([divisor, skipped], device=device)
        optimizer.step(*torch.tensor([divisor, skipped], device=device))
        expected.step()
        if step == 1:
            kept = {
                index: {key: value.clone() for key, value in state.items()} for index, state in optimizer.state.items()
            }
            optimizer = Adam(own, optimizer.learning_rate)
            optimizer.load(kept)
    assert all(torch.equal(one, other) for one, other in zip(own, theirs, strict=True))
    states = expected.state_dict()["state"]
    assert optimizer.state.keys() == states.keys() == {0, 1, 2, 3}
    for index, state in states.items():
        assert optimizer.state[index].keys() == state.keys()
        assert all(torch.equal(optimizer.state[index][key], value) for key, value in state.items())


STEPS = """
import sys, torch
from restoration.config import make_config
from restoration.step import Optimisation
from restoration.train import build_step
from restoration.vgg import loss_features
config = make_config("small", crop=32, batch=1, blocks=1, anchors=8, precision="{precision}")
optimise = Optimisation(build_step(config, loss_features()), config, torch.device("cpu"))
optimise(0, *torch.rand(2, 1, 3, 32, 32))
sys.exit("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_imports_no_compiler(precision):
    """Which takes 145 MB and a second."""
    assert subprocess.run([sys.executable, "-c", STEPS.format(precision=precision)], check=False).returncode == 0
