"""A whole training step: ours beside the same network with plain autograd, and that on the reference operators."""

import contextlib
import functools
import math
from dataclasses import dataclass, replace

import torch

from benchmarks.contest import Rival
from restoration.config import make_config
from restoration.graph import WARM_UP
from restoration.step import Optimisation
from restoration.train import build_step
from restoration.vgg import loss_features
from restoration_kernels import use_backend

# Sides of the square crops and crops in a batch, the paper's first. The quick ones have one block a stage.
SIZES = ((512, 2), (512, 1), (256, 2), (256, 1))
QUICK_SIZES = ((32, 1),)
# Of the losses of rivals at the first step: streams that are rounded to their quantum differently differ by 2^-16.
TOLERANCE = 1e-2


def _step_of(reversible, backend=None, precision="fp32"):
    """Function of (optimisation settings and crops) that makes one step, the parameters' update included."""

    def prepare(arguments):
        degraded, reference = arguments["degraded"], arguments["reference"]
        settings = {name: arguments[name] for name in ("blocks", "capture")}
        settings |= {"crop": degraded.shape[-1], "batch": len(degraded)}
        config = make_config("paper", reversible=reversible, precision=precision, **settings)
        torch.manual_seed(0)
        module = build_step(config, loss_features()).to(degraded.device)
        optimise = Optimisation(module, config, degraded.device)
        return {"optimise": optimise, "degraded": degraded, "reference": reference}

    def run(optimise, degraded, reference):
        with use_backend(backend) if backend else contextlib.nullcontext():
            return optimise(0, degraded, reference)

    return {"function": run, "prepare": prepare}


# None is judged by numbers of an operator: what they find is compared by `_gate`, and in tests/test_reversible.py.
OURS = Rival("ours", **_step_of(True), floor=True)
PLAIN = Rival("plain autograd", **_step_of(False), floor=True)
# Other numbers than the three in float32, and judged by none; it is here for its time and memory.
BFLOAT16 = Rival("ours, bfloat16", **_step_of(True, precision="bf16"), floor=True)
REFERENCE = Rival("plain autograd, reference operators", **_step_of(False, "reference"), floor=True)


@dataclass(frozen=True)
class StepEntry:
    """One benchmark, as benchmarks/conftest.py takes them."""

    rival: Rival
    side: int
    batch: int
    blocks: int
    device: str
    captured: bool = True  # as a CUDA graph, on a GPU
    in_series = False

    def __str__(self):
        return f"{self.group}/{self.rival.name.replace(' ', '_')}"

    @property
    def group(self):
        return f"training_step/forward+backward/{self.size}"

    @property
    def size(self):
        return f"{self.side}_batch_{self.batch}"

    @property
    def reference(self):
        return replace(self, rival=REFERENCE)

    @property
    def uncaptured(self):
        return replace(self, captured=False)

    def arguments(self):
        """Smooth crops, nearer to paintings than noise is."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(2 * self.batch, 3, self.side // 8, self.side // 8, generator=generator)
        images = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1).to(self.device)
        settings = {"blocks": self.blocks, "capture": self.captured}
        return {"degraded": images[: self.batch], "reference": images[self.batch :], **settings}

    def why_not(self, arguments):
        return None

    def call(self, prepared):
        _gate(self.device)

        def work():
            outcome = self.rival.function(**prepared)
            if self.device == "cuda":
                torch.cuda.synchronize()
            return {"numbers": outcome.numbers}

        if self.device == "cuda" and self.captured:
            for _ in range(1 + WARM_UP):  # the last of them is captured
                work()
        return work

    def description(self, arguments):
        crops = 2 * arguments["degraded"].nbytes
        parameters = sum(parameter.nbytes for parameter in _parameters(self.blocks))
        return {
            "operator": "training_step",
            "direction": "forward+backward",
            "size": self.size,
            "rival": self.rival.name,
            "floor": False,
            "in_series": False,
            "megapixels": self.batch * self.side**2 / 1e6,
            # Crops read; parameters and Adam's two moments read and written.
            "bytes_moved": crops + 6 * parameters,
        }


class StepContest:
    """What CONTESTS holds for a whole step in place of an operator."""

    kinds = (OURS, PLAIN, REFERENCE, BFLOAT16)

    def entries(self, device, quick):
        sizes, blocks = (QUICK_SIZES, 1) if quick else (SIZES, 10)
        return [StepEntry(rival, side, batch, blocks, device) for side, batch in sizes for rival in self.kinds]


@functools.cache
def _parameters(blocks):
    return list(build_step(make_config("paper", blocks=blocks), loss_features()).parameters())


@functools.cache
def _gate(device):
    """Raises AssertionError unless all rivals find the same losses and gradient on a small crop."""
    found = {}
    for rival in (REFERENCE, PLAIN, OURS):
        prepared = rival.prepare(StepEntry(rival, 32, 1, 1, device).arguments())
        outcome = rival.function(**prepared)
        found[rival.name] = dict(zip(outcome.names, outcome.numbers.tolist(), strict=True))
    for name, expected in found[REFERENCE.name].items():
        for rival, numbers in found.items():
            agrees = math.isclose(numbers[name], expected, rel_tol=TOLERANCE, abs_tol=1e-4)
            assert agrees, f"{rival}: {name} is {numbers[name]:.6g}, the reference's {expected:.6g}"


CONTESTS = [StepContest()]


def test_speed(measure, entry):
    measure(entry)
