"""Fragments of tensor cores, asynchronous copies and large shared memory, in the runner of .cu files on the CPU."""

import ctypes

import compare
import pytest
import simt_build
import torch
from simt_build import both_orders, needs_compiler, pointer

pytestmark = needs_compiler

THREADS = 64  # of planted_fragments.cu
KINDS = ("tf32", "float16", "bfloat16")  # of operands


@pytest.fixture(scope="module")
def planted():
    library = simt_build.load_library(simt_build.SIMT / "planted_fragments.cu")
    library.copy.restype = library.use_shared.restype = ctypes.c_char_p
    return library


def raise_error(error):
    if error is not None:
        raise RuntimeError(error.decode())


def product(planted, kind, left, right):
    sums = torch.full((2, 16, 8), torch.nan)
    planted.product(kind.encode(), pointer(left), pointer(right), pointer(sums))
    return sums


@both_orders
@pytest.mark.parametrize("kind", KINDS)
def test_products(planted, kind, order):
    """Numbers of few bits, whose products and sums are exact: any wrong place or lost number shows."""
    depth = 24 if kind == "tf32" else 48
    left, right = torch.randint(-8, 8, (16, depth)).float(), torch.randint(-8, 8, (depth, 8)).float()
    exact = (left.double() @ right.double()).float()
    assert torch.equal(product(planted, kind, left, right), torch.stack([exact, -exact]))


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_rounded_operands(planted, kind):
    """Each operand is rounded to the nearest number that the fragment holds, and nothing else but the sum is."""
    depth = 24 if kind == "tf32" else 48
    left, right = torch.rand(16, depth) + 1, torch.rand(depth, 8) + 1
    # One operand in thousands lies in the middle: tf32 then rounds away from zero, the others to even.
    held = [compare.round_to_tf32(x) if kind == "tf32" else x.to(getattr(torch, kind)) for x in (left, right)]
    exact = held[0].double() @ held[1].double()
    sums = product(planted, kind, left, right)
    torch.testing.assert_close(sums[0].double(), exact, rtol=depth * 2.0**-24, atol=0)
    torch.testing.assert_close(sums[1], -sums[0], rtol=0, atol=0)


def test_operands_that_nobody_rounded_are_cut_off(planted):
    left, right = torch.full((16, 24), 2 - 2.0**-20), torch.ones(24, 8)
    assert torch.equal(product(planted, "tf32", left, right)[0], torch.full((16, 8), 48.0))
    cut_off = torch.full((16, 8), 24 * (2 - 2.0**-10))
    assert torch.equal(product(planted, "tf32_not_rounded", left, right)[0], cut_off)


def test_rounding_to_tf32(planted):
    """Nearest, ties away from zero; denormal numbers keep a fixed step, Inf stays, NaN stays NaN."""
    step = 2.0**-10
    x = torch.tensor([1 + step / 2, -1 - step / 2, 1 + 0.49 * step, 2 - step / 4, 2.0**-140, torch.inf, torch.nan])
    expected = torch.tensor([1 + step, -1 - step, 1, 2, 0, torch.inf, torch.nan])
    y = torch.empty_like(x)
    planted.round_to_tf32(pointer(x), pointer(y), len(x))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@both_orders
@pytest.mark.parametrize("width", [4, 16])
def test_copies(planted, width, order):
    """Whole pieces and a cut off one, behind which are zeros."""
    piece = THREADS * width // 4
    x = torch.randn(3 * piece - 20)
    y = torch.full((3 * piece,), torch.nan)
    raise_error(planted.copy(width, True, pointer(x), pointer(y), len(x)))
    assert torch.equal(y, torch.nn.functional.pad(x, (0, 20)))


@both_orders
def test_copies_nobody_waited_for_are_nan(planted, order):
    x, y = torch.randn(3 * THREADS), torch.zeros(3 * THREADS)
    raise_error(planted.copy(4, False, pointer(x), pointer(y), len(x)))
    assert y[:THREADS].isnan().all()


def test_misaligned_copies_are_errors(planted):
    x, y = torch.randn(5 * THREADS), torch.zeros(4 * THREADS)
    with pytest.raises(RuntimeError, match=r"^simt: copy_async of a misaligned address: block \(0, 0, 0\)"):
        raise_error(planted.copy(16, True, pointer(x[1:]), pointer(y), len(x) - THREADS))


def test_large_shared_memory_must_be_asked_for(planted):
    """48 KB are free; beyond, and up to the 99 KB of compute capability 8.6, as much as the kernel asked for."""
    y = torch.arange(THREADS, dtype=torch.float32)

    def use(kilobytes, allowed=0):
        raise_error(planted.use_shared(kilobytes << 10, allowed << 10, pointer(y)))

    use(48)
    with pytest.raises(RuntimeError, match=r"^simt: launch of large_shared_kernel with a grid, block or shared memory"):
        use(49)
    use(99, allowed=99)
    use(64, allowed=64)
    with pytest.raises(RuntimeError, match=r"^simt: launch of large_shared_kernel"):
        use(65)
    with pytest.raises(RuntimeError, match=r"^102400 bytes of shared memory were refused to a kernel: invalid"):
        use(100, allowed=100)
    assert torch.equal(y, torch.arange(THREADS, dtype=torch.float32))
