"""Compiles the Triton kernels of all operators for GPUs that are not there. Run as a script, in its own process.

Prints one line of JSON for each kernel, architecture and combination of argument types: the registers, stack and local
memory of the machine code. Operators are called on sample inputs, with a driver that names the GPU wished for and with
launches that only compile, so that each kernel is compiled for exactly the arguments that it is given.
"""

import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import compare
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from restoration.blocks import STREAM_QUANTUM
from restoration_kernels import _backend
from restoration_kernels._samples import DIFFERENTIABLE, samples

# Of the RTX 3090 and of Hopper, by the numbers that Triton calls them.
ARCHITECTURES = (86, 90)
WARP_THREADS = 32
# Of pac_conv2d: without tensor cores, and with the kernels of what the others do not ask for.
OTHER_SAMPLES = ("odd_stride", "normalize", "shared")
# Of pac_conv2d: how the model's blocks call it at the first and last of its scales. That between takes the same tiles.
BLOCK_SAMPLES = ("4_to_16_at_512", "64_to_256_at_128")


class AbsentGpu:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, WARP_THREADS)

    def get_current_device(self):
        # Triton keeps what is compiled for one device apart from what is compiled for another.
        return self.architecture

    def get_current_stream(self, device):
        return 0


@triton.jit
def spilling_kernel(x, y, BLOCK: tl.constexpr):
    """Holds more numbers a thread than there are registers: shows that the report tells."""
    index = tl.arange(0, BLOCK)
    values = tl.load(x + index)
    tl.store(y + index, values - tl.max(values))


def launch_everything():
    """Calls what launches every kernel, forward and backward."""
    x = torch.zeros(256 * WARP_THREADS)
    spilling_kernel[(1,)](x, x, x.numel(), num_warps=1)
    for name, operator in _backend.OPERATORS.items():
        # What writes in place launches the kernels of the operator that does not.
        if not operator.has("triton") or name not in DIFFERENTIABLE:
            continue
        # Rows that are no whole vectors take most registers, those that are take other instructions, and a size of one,
        # which the last of the tiny samples has, is a constant of another type to Triton.
        chosen = [(samples(name, "odd")[0], torch.float32), (samples(name, "tiny")[-1], torch.float64)]
        if name != "pac_conv2d":
            chosen.append((samples(name, "model")[0], torch.bfloat16))
        others = [(sample, torch.float32) for sample in samples(name) if sample.name in OTHER_SAMPLES]
        for sample, dtype in [*chosen, *others]:
            differentiate(name, sample.arguments(dtype))
    launch_blocks()
    # What training does, where no run must repeat another: gradients are added atomically.
    torch.use_deterministic_algorithms(False)
    differentiate("neighbor_difference", samples("neighbor_difference", "odd")[0].arguments())
    torch.use_deterministic_algorithms(True)


def launch_blocks():
    """Calls pac_conv2d as restoration/blocks.py does: in float32 without and with tf32, and in bfloat16."""
    for sample in samples("pac_conv2d"):
        if sample.name not in BLOCK_SAMPLES:
            continue
        for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            arguments = sample.arguments(dtype)
            batch, _, height, width = arguments["x"].shape
            residual = torch.zeros(batch, len(arguments["weight"]), height, width)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                differentiate("pac_conv2d", {**arguments, "residual": residual, "quantum": STREAM_QUANTUM})


def differentiate(name, arguments):
    """Calls an operator, forward and backward."""
    compare.differentiate(compare.public(name, "triton"), arguments, DIFFERENTIABLE[name])


def start_with_every_tile(tuned, grid, *arguments):
    """In place of `start`, which takes one: on a GPU, a tile that does not compile would end the tuning."""
    for config in tuned.configs:
        tuned.fn[grid](*arguments, **config.all_kwargs())


def resources(kernel):
    """Numbers of a compiled kernel such as {"REG": 24, "STACK": 0, "LOCAL": 0, "shared": 0}, memory in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", report)}
    # The machine code does not tell what is asked for at launch.
    return {**numbers, "shared": kernel.metadata.shared}


def main():
    """Compiles and prints."""
    launch = JITFunction.run
    kernels = {}

    def compile_only(function, *arguments, grid, warmup, **options):
        kernel = launch(function, *arguments, grid=grid, warmup=True, **options)
        kernels[kernel.hash] = kernel

    JITFunction.run = compile_only
    _backend.why_not_on = lambda backend, device: None
    torch.use_deterministic_algorithms(True)
    for path in Path(_backend.__file__).parent.glob("*_triton.py"):
        module = importlib.import_module(f"restoration_kernels.{path.stem}")
        if hasattr(module, "start"):
            module.start = start_with_every_tile
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(AbsentGpu(architecture))
        launch_everything()
    for kernel in kernels.values():
        print(json.dumps({"kernel": kernel.name, "architecture": kernel.metadata.target.arch, **resources(kernel)}))


if __name__ == "__main__":
    main()
