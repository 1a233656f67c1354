"""The runner of .cu files on the CPU, by its own planted mistakes, and the CUDA kernels in it."""

import ctypes
import subprocess
import sys

import compare
import matting_guides
import pytest
import simt_build
import torch
import torch.nn.functional as F
from simt_build import both_orders, needs_compiler, pointer

from restoration_kernels import matting_laplacian_apply, matting_laplacian_energy, relu_split

needs_nvcc = pytest.mark.skipif(simt_build.nvcc() is None, reason="no nvcc")

THREADS = 96  # of planted.cu
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

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
        for kernel in ("affinity", "input", "weight", "shared", "centre", "guide", "reduce", "pack")
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


# Odd, aligned, smaller than the pooling, wider than a tile, tall, one pixel; two tiles each way in every dtype, more
# planes than a block adds up at once.
SHAPES = [
    *((2, 5, 37, 61), (1, 4, 33, 64), (2, 3, 7, 200), (1, 2, 3, 1100), (1, 2, 500, 3), (2, 4, 1, 1)),
    *((1, 2, 18, 2056), (2, 130, 1, 3)),
]


@needs_compiler
@both_orders
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dual_pool_attention(shape, dtype, order):
    check_dual_pool_attention(shape, dtype, dtype)


# Two tiles of channels, several of rows and columns; padding of nearly a side; less than a tile; one pixel; more tiles
# than a warp adds up at once; a tile that begins with the last mirrored row.
PAD2D_SHAPES = [
    *(((2, 18, 37, 70), 1), ((1, 3, 5, 9), 4), ((1, 16, 4, 64), 2), ((3, 2, 1, 1), 0)),
    *(((1, 2, 140, 8), 4), ((1, 2, 24, 8), 4)),
]


@needs_compiler
@both_orders
@pytest.mark.parametrize(("shape", "padding"), PAD2D_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "output_dtype"),
    [*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_dual_pool_attention_pad2d(shape, padding, dtype, output_dtype, order):
    check_dual_pool_attention(shape, dtype, output_dtype, padding)


def check_dual_pool_attention(shape, dtype, output_dtype, padding=None):
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, padded_shape(shape, padding))
    )
    weight = torch.randn(5, generator=generator, dtype=torch.float64).to(dtype)
    x, grad_y = x.to(dtype), grad_y.to(output_dtype)
    # The padded operator adds to the gradient of x.
    grad_addend = None if padding is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    exact = define_dual_pool_attention(x.double(), weight.double(), grad_y.double(), padding, grad_addend)
    plain = define_dual_pool_attention(x, weight, grad_y.to(dtype), padding, grad_addend)
    ours = run_dual_pool_attention(x, weight, grad_y, padding=padding, grad_addend=grad_addend)
    # Nothing is more exact than float64, so there the definition's own rounding counts.
    ulps = compare.REFERENCE_ULPS[dtype] if dtype == torch.float64 else compare.ULPS
    for name, result, right, reference in zip(("y", "grad_x", "grad_weight"), ours, exact, plain, strict=True):
        compare.judge(name, result, right, reference.to(result.dtype), ulps)


def padded_shape(shape, padding):
    """Of y: that of x, with a padding on every side unless it is None."""
    batch, channels, height, width = shape
    return batch, channels, height + 2 * (padding or 0), width + 2 * (padding or 0)


either_operator = pytest.mark.parametrize("padding", [None, 1], ids=["plain", "pad2d"])


@needs_compiler
@either_operator
@pytest.mark.parametrize("wanted", ["grad_x", "grad_weight"])
def test_dual_pool_attention_computes_what_is_wanted(wanted, padding):
    x, weight = torch.randn(2, 3, 5, 7), torch.randn(3)
    grad_y = torch.randn(padded_shape(x.shape, padding))
    everything = run_dual_pool_attention(x, weight, grad_y, padding=padding)
    one = run_dual_pool_attention(x, weight, grad_y, wanted=(wanted,), padding=padding)
    for name, alone, together in zip(("grad_x", "grad_weight"), one[1:], everything[1:], strict=True):
        assert torch.equal(alone, together) if name == wanted else alone.isnan().all()


@needs_compiler
@either_operator
def test_dual_pool_attention_without_images(padding):
    x = torch.empty(0, 3, 5, 7)
    grad_y = torch.empty(padded_shape(x.shape, padding))
    y, grad_x, grad_weight = run_dual_pool_attention(x, torch.randn(3), grad_y, padding=padding)
    assert y.shape == grad_y.shape
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros(3))


@needs_compiler
def test_dual_pool_attention_refuses_an_unknown_dtype():
    extension = simt_build.load_extension()
    with pytest.raises(ValueError, match=r"^dual_pool_attention: dtype must be .*, got code 7$"):
        extension.dual_pool_attention_workspace_cuda(batch=1, channels=1, height=1, width=1, dtype=7)


# Two tiles of channels of which one goes both ways, several of rows and columns; less than a tile; whole tiles.
RELU_SPLIT_SHAPES = [((2, 18, 37, 70), 5), ((1, 3, 5, 9), 2), ((1, 32, 4, 64), 16), ((3, 2, 1, 1), 1)]


@needs_compiler
@both_orders
@pytest.mark.parametrize(("shape", "channels"), RELU_SPLIT_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_split(shape, channels, dtype, order):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    outputs = relu_split(x, channels, backend="reference")
    gradients = [torch.randn_like(output) for output in outputs]
    (grad_x,) = torch.autograd.grad(outputs, x, gradients)
    for ours, expected in zip(run_relu_split(x.detach(), channels, gradients), (*outputs, grad_x), strict=True):
        assert torch.equal(ours, expected)


@needs_compiler
def test_relu_split_without_images():
    rectified, rest, grad_x = run_relu_split(torch.empty(0, 3, 5, 7), 2, torch.empty(0, 3, 5, 7).split((2, 1), 1))
    assert [tensor.shape for tensor in (rectified, rest, grad_x)] == [(0, 2, 5, 7), (0, 1, 5, 7), (0, 3, 5, 7)]


# Odd, one window, no window, several tiles each way, one row of windows.
MATTING_SHAPES = [(2, 3, 37, 61), (1, 1, 3, 3), (5, 2, 2, 6), (1, 2, 40, 70), (1, 4, 3, 80)]


@needs_compiler
@both_orders
@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("shape", MATTING_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "float64"),
    [(torch.float32, "fast"), (torch.float32, "slow"), (torch.float64, "fast")],
    ids=str,
    indirect=["float64"],
)
def test_matting_laplacian(shape, radius, dtype, order, float64):
    check_matting_laplacian(shape, dtype, radius)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 3, 7720), (5, 2, 4, 40)], ids=["tiles", "images"])
def test_matting_laplacian_of_more_than_fit_at_once(shape):
    """Tiles in the block that adds up their energies, images in a grid."""
    check_matting_laplacian(shape, torch.float32, radius=1)


def check_matting_laplacian(shape, dtype, radius):
    batch, _, height, width = shape
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    guide = torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)
    energy, product = run_matting_laplacian(image, guide, radius=radius)
    options = {"radius": radius, "backend": "reference"}
    exact_energy = matting_laplacian_energy(image.double(), guide.double(), **options)
    exact_product = matting_laplacian_apply(image.double(), guide.double(), **options)
    ulps = compare.REFERENCE_ULPS[dtype] if dtype == torch.float64 else compare.ULPS
    compare.judge("energy", energy, exact_energy, ulps=ulps)
    compare.judge("product", product, exact_product, ulps=ulps)


@needs_compiler
@matting_guides.both_speeds_of_float64
@pytest.mark.parametrize("eps", [1e-15, 1e-7, 1e-5])
@pytest.mark.parametrize("picture", matting_guides.PICTURES)
def test_matting_laplacian_accuracy(picture, eps, float64):
    """The bounds of test_accuracy_in_float32, in the CUDA kernel."""
    guide = matting_guides.draw(picture)
    for name in ("stylised", "affine"):
        image = matting_guides.recolour(name, guide)
        ours = run_matting_laplacian(image, guide, eps=eps)
        pair, options = (image.double(), guide.double()), {"eps": eps, "backend": "reference"}
        exact = matting_laplacian_energy(*pair, **options), matting_laplacian_apply(*pair, **options)
        for result, right, bound in zip(ours, exact, (2e-7, 5e-7), strict=True):
            assert (result.double() - right).abs().max() <= bound * right.abs().max(), name


@needs_compiler
def test_matting_laplacian_computes_in_two_float_where_float64_is_slow(monkeypatch):
    """But not float64 tensors, nor where a fit may be too nearly singular for it."""
    guide = matting_guides.draw("noise")

    def same(eps, guide):
        products = []
        for speed in ("fast", "slow"):
            monkeypatch.setenv("RESTORATION_CUDA_FLOAT64", speed)
            products.append(run_matting_laplacian(0.7 * guide + 0.1, guide, eps=eps)[1])
        return torch.equal(*products)

    assert not same(1e-7, guide)
    assert same(1e-16, guide)
    assert same(1e-7, guide.double())
    monkeypatch.setenv("RESTORATION_CUDA_FLOAT64", "")
    with pytest.raises(ValueError, match="RESTORATION_CUDA_FLOAT64 must be fast or slow, got"):
        run_matting_laplacian(guide, guide)


@needs_compiler
@matting_guides.both_speeds_of_float64
def test_matting_laplacian_computes_what_is_wanted(float64):
    image, guide = torch.rand(2, 2, 3, 9, 40)
    energy, product = run_matting_laplacian(image, guide)
    assert torch.equal(run_matting_laplacian(image, guide, wanted=("energy",))[0], energy)
    assert torch.equal(run_matting_laplacian(image, guide, wanted=("product",))[1], product)


@needs_compiler
def test_matting_laplacian_without_images():
    energy, product = run_matting_laplacian(*torch.rand(2, 0, 3, 5, 7))
    assert energy.shape == (0,)
    assert product.shape == (0, 3, 5, 7)


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


def define_dual_pool_attention(x, weight, grad_y, padding=None, grad_addend=None):
    """The definition, with torch's own pooling and padding: y, grad_x, grad_weight."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    mean = F.adaptive_avg_pool2d(x, 50).mean((2, 3))
    scale = torch.sigmoid(F.conv1d(mean[:, None], weight[None, None], padding=len(weight) // 2))[:, 0]
    y = x * scale[:, :, None, None]
    if padding is not None:
        y = F.pad(y, (padding,) * 4, mode="reflect")
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y)
    return y.detach(), grad_x if grad_addend is None else grad_x + grad_addend, grad_weight


def run_dual_pool_attention(x, weight, grad_y, wanted=("grad_x", "grad_weight"), padding=None, grad_addend=None):
    """The same by the CUDA kernels, with a padding by the padded operator's. What they do not write stays NaN."""
    extension = simt_build.load_extension()
    x, weight, grad_y = x.detach(), weight.detach(), grad_y.detach()
    batch, channels, height, width = x.shape
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "dtype": simt_build.dtype_code(x)}
    operator, options = "dual_pool_attention", {"taps": len(weight), "pool_size": 50, "stream": 0}
    if padding is not None:
        operator += "_pad2d"
        options.update(padding=padding, output_dtype=simt_build.dtype_code(grad_y))
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    workspace = torch.empty(getattr(extension, f"{operator}_workspace_cuda")(**sizes), dtype=torch.uint8)
    mean, scale = torch.full((2, batch, channels), torch.nan, dtype=simt_build.accumulate_dtype(x.dtype))
    y, grad_x, grad_weight = (torch.full_like(tensor, torch.nan) for tensor in (grad_y, x, weight))
    tensors = {"x": x, "weight": weight, "mean": mean, "scale": scale, "workspace": workspace}
    common = {**sizes, **options, **{name: tensor.data_ptr() for name, tensor in tensors.items()}}
    workspace.fill_(255)
    getattr(extension, f"{operator}_forward_cuda")(y=y.data_ptr(), **common)
    workspace.fill_(255)
    if padding is not None:
        common["grad_addend"] = 0 if grad_addend is None else grad_addend.data_ptr()
    getattr(extension, f"{operator}_backward_cuda")(
        grad_y=grad_y.data_ptr(),
        grad_x=grad_x.data_ptr() if "grad_x" in wanted else 0,
        grad_weight=grad_weight.data_ptr() if "grad_weight" in wanted else 0,
        **common,
    )
    return y, grad_x, grad_weight


def run_relu_split(x, channels, gradients):
    """rectified, rest and grad_x by the CUDA kernels. What they do not write stays NaN."""
    extension = simt_build.load_extension()
    batch, _, height, width = x.shape
    sizes = {"batch": batch, "channels": x.shape[1], "split": channels, "height": height, "width": width}
    options = {**sizes, "dtype": simt_build.dtype_code(x), "stream": 0}
    x = x.contiguous(memory_format=torch.channels_last)
    gradients = [gradient.contiguous() for gradient in gradients]
    rectified, rest = (torch.full_like(gradient, torch.nan) for gradient in gradients)
    grad_x = torch.full_like(x, torch.nan)
    extension.relu_split_forward_cuda(x=x.data_ptr(), rectified=rectified.data_ptr(), rest=rest.data_ptr(), **options)
    extension.relu_split_backward_cuda(
        grad_rectified=gradients[0].data_ptr(),
        grad_rest=gradients[1].data_ptr(),
        rectified=rectified.data_ptr(),
        grad_x=grad_x.data_ptr(),
        **options,
    )
    return rectified, rest, grad_x


def run_matting_laplacian(image, guide, *, eps=1e-7, radius=1, wanted=("energy", "product")):
    """Energy and product by the CUDA kernels. What they do not write stays NaN."""
    extension = simt_build.load_extension()
    sizes = dict(zip(("batch", "channels", "height", "width"), image.shape, strict=True), radius=radius)
    sizes["dtype"] = simt_build.dtype_code(image)
    energy, product = torch.full_like(image[:, 0, 0, 0], torch.nan), torch.full_like(image, torch.nan)
    workspace = torch.full((extension.matting_laplacian_workspace_cuda(**sizes),), 255, dtype=torch.uint8)
    extension.matting_laplacian_cuda(
        image=image.data_ptr(),
        guide=guide.data_ptr(),
        product=product.data_ptr() if "product" in wanted else 0,
        energy=energy.data_ptr() if "energy" in wanted else 0,
        workspace=workspace.data_ptr(),
        factor=1.0,
        eps=eps,
        stream=0,
        **sizes,
    )
    return energy, product
