"""The runner of .cu files on the CPU, by its own planted mistakes; memory and registers of all CUDA kernels."""

import ctypes
import subprocess
import sys

import pytest
import simt_build
import torch
from simt_build import both_orders, needs_compiler, pointer

needs_nvcc = pytest.mark.skipif(simt_build.nvcc() is None, reason="no nvcc")

THREADS = 96  # of planted.cu

# Kernels that touch every pixel: a spilled register costs memory traffic, which is all that their time is made of.
HOT_KERNELS = {
    "ccpl_cuda.cu": ["neighbor_difference_forward_kernel", "neighbor_difference_backward_kernel"],
    "ccpl_info_nce_cuda.cu": [
        "info_nce_forward_kernel",
        "info_nce_backward_kernel",
        "info_nce_forward_matrix_kernel",
        "info_nce_backward_matrix_kernel",
    ],
    "dual_pool_attention_cuda.cu": [
        "dual_pool_attention_forward_reduce_kernel",
        "dual_pool_attention_forward_scale_kernel",
        "dual_pool_attention_backward_reduce_kernel",
        "dual_pool_attention_backward_input_kernel",
    ],
    "dual_pool_attention_pad2d_cuda.cu": [
        "dual_pool_attention_pad2d_forward_kernel",
        "dual_pool_attention_pad2d_backward_reduce_kernel",
        "dual_pool_attention_pad2d_backward_input_kernel",
    ],
    "pac_conv2d_cuda.cu": ["pac_conv2d_forward_kernel", "pac_conv2d_pack_kernel"],
    "pac_conv2d_backward_cuda.cu": [
        f"pac_conv2d_backward_{kernel}_kernel"
        for kernel in ("affinity", "input", "staged", "weight", "shared", "centre", "guide", "reduce", "pack")
    ],
    "relu_split_cuda.cu": ["relu_split_forward_kernel", "relu_split_backward_kernel"],
    # Of each arithmetic at radius 1; the windows of radius 2 and 3 are larger than a thread's registers.
    "matting_laplacian_cuda.cu": [f"matting_laplacian_kernelI{types}Li1E" for types in ("fd", "fNS_8TwoFloatE", "dd")],
}


@pytest.fixture(scope="module")
def planted():
    library = simt_build.load_library(simt_build.SIMT / "planted.cu")
    library.run.restype = ctypes.c_char_p
    return library


def run(planted, kernel):
    """What the kernel makes of 0, 1, 2, ...; its error as RuntimeError."""
    x, y = torch.arange(THREADS, dtype=torch.float32), torch.zeros(THREADS)
    error = planted.run(kernel.encode(), pointer(x), pointer(y))
    if error is not None:
        raise RuntimeError(error.decode())
    return y


@needs_compiler
@both_orders
@pytest.mark.parametrize(("kernel", "distance"), [("rotate", 1), ("rotate_twice", 2)])
def test_right_kernels_are_right(planted, order, kernel, distance):
    assert torch.equal(run(planted, kernel), torch.arange(THREADS).roll(-distance).float())


@needs_compiler
@both_orders
def test_missing_barrier_reads_nan(planted, order):
    assert run(planted, "rotate_without_barrier").isnan().any()


@needs_compiler
def test_missing_barrier_depends_on_order(planted, monkeypatch):
    """Nothing unwritten is read here; what is read was overwritten too early, in one order or the other."""
    monkeypatch.delenv("SIMT_REVERSE", raising=False)
    forward = run(planted, "rotate_twice_without_barrier")
    monkeypatch.setenv("SIMT_REVERSE", "1")
    reverse = run(planted, "rotate_twice_without_barrier")
    assert not torch.equal(forward, reverse)


@needs_compiler
@both_orders
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent_barrier", r"__syncthreads was not reached by every thread of the block: block \([01], 0, 0\)"),
        ("missing_lane", "__syncwarp was not reached by every lane that its mask names"),
        ("foreign_lane", "__syncwarp by a lane that its mask does not name"),
        ("too_much_shared", "more shared memory than a block has"),
        ("too_many_threads", "launch of missing_lane_kernel with a grid, block or shared memory that CUDA refuses"),
        ("empty_grid", "launch of missing_lane_kernel"),
        ("high_grid", "launch of missing_lane_kernel"),
    ],
)
def test_mistakes_are_errors(planted, order, kernel, message):
    with pytest.raises(RuntimeError, match=f"^simt: {message}"):
        run(planted, kernel)
    assert torch.equal(run(planted, "rotate"), torch.arange(THREADS).roll(-1).float()), "the runner did not recover"


@needs_compiler
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("none", ""),
        ("global", "heap-buffer-overflow"),
        ("shared", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_memory_mistakes_end_a_sanitized_program(mistake, message):
    program = simt_build.build_sanitized_program(simt_build.SIMT / "planted.cu")
    result = subprocess.run([program, mistake], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (mistake == "none"), result.stderr
    assert message in result.stderr


@needs_compiler
@both_orders
def test_warp_operations(planted, order):
    source = torch.randint(-64, 64, (THREADS,), dtype=torch.int32)
    y = torch.zeros(6, THREADS)
    planted.shuffle(pointer(source), pointer(y))
    lane = torch.arange(THREADS) % 32
    votes = (torch.arange(THREADS) % 3 == 0) * 2**lane
    expected = [
        source % 32,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane % 16 + 5 < 16, lane + 5, lane),
        lane ^ 9,
        votes.view(-1, 16).sum(1).repeat_interleave(16) & 0xFFFF,
    ]
    assert torch.equal(y[:5], torch.stack(expected).float())
    assert y[5].isnan().all()


@needs_compiler
def test_order_and_atomics(planted, monkeypatch):
    for environment, expected in (({}, range(80)), ({"SIMT_REVERSE": "1"}, range(79, -1, -1))):
        monkeypatch.delenv("SIMT_REVERSE", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        order = torch.zeros(81, dtype=torch.int32)
        planted.count(pointer(order))
        assert order.tolist() == [*expected, 80]


@needs_compiler
@both_orders
def test_every_thread_of_a_grid_runs_once(planted, order):
    y = torch.zeros(24 * 24, dtype=torch.int32)
    planted.grid(pointer(y))
    assert torch.equal(y, torch.arange(24 * 24, dtype=torch.int32))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_sixteen_bit_numbers(planted, dtype):
    """All numbers of the dtype, all midpoints between two of them, and what lies beside the midpoints."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middle = (exact[:-1].double() + exact[1:].double()).div(2).float()
    beside = [middle.nextafter(torch.tensor(side)) for side in (torch.inf, -torch.inf)]
    x = torch.cat([exact, middle, *beside])
    y = torch.empty_like(x)
    function = planted.round_to_half if dtype == torch.float16 else planted.round_to_bfloat16
    function(pointer(x), pointer(y), len(x))
    torch.testing.assert_close(y, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.slow
def test_kernels_stay_within_their_memory():
    """CPU and CUDA kernels of every operator under the address sanitizer, in a process of its own."""
    command = [sys.executable, simt_build.SIMT / "run_kernels.py", simt_build.build_extension("memory")]
    environment = simt_build.address_sanitizer_environment()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(path.name for path in simt_build.CSRC.glob("*.cu")))
def test_nvcc_compiles_without_spills(source):
    """For sm_86 and sm_90. Every kernel listed as hot is there, and keeps its variables in registers."""
    report = simt_build.resource_report(simt_build.CSRC / source)
    assert {kernel["architecture"] for kernel in report} == {"sm_86", "sm_90"}
    for name in HOT_KERNELS.get(source, []):
        kernels = [kernel for kernel in report if name in kernel["symbol"]]
        assert kernels, f"{name} is listed as hot, but {source} has no such kernel"
        for kernel in kernels:
            assert kernel["stack_bytes"] == kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0, kernel


def test_resource_report_is_read():
    text = """ptxas info    : Compiling entry function '_Z1aPf' for 'sm_86'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 400 bytes smem, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""
    a = {"symbol": "_Z1aPf", "architecture": "sm_86", "registers": 48, "shared_bytes": 400}
    b = {"symbol": "_Z1bPf", "architecture": "sm_90", "registers": 10, "shared_bytes": 0}
    assert simt_build.parse_resources(text) == [
        {**a, "stack_bytes": 16, "spill_store_bytes": 8, "spill_load_bytes": 12},
        {**b, "stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0},
    ]
