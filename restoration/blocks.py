"""The pieces of the reversible network: lossless residual blocks and the two modules of their residual function.

Source: Sun, Zhang, Wu, "Color reconstruction of ancient paintings based on dual pooling attention and pixel adaptive
convolution", npj Heritage Science 13 (2025), doi 10.1038/s40494-025-01595-0; equation numbers are that paper's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.convolution import conv2d
from restoration_kernels import dual_pool_attention_pad2d, pac_conv2d, pac_conv2d_, relu_split

# Streams hold multiples of 2^-16: a 256th of an 8-bit level, fine enough to be invisible, and coarse enough that
# sums below 2^8 fit float32's 24 bits exactly. Addition is then associative and every block exactly invertible.
STREAM_QUANTUM = 2.0**-16
STREAM_LIMIT = 2.0**8

GUIDE_CHANNELS = 8  # enough to tell neighbouring materials apart; each one costs nine subtractions a pixel
ATTENTION_TAPS = 5  # neighbouring channels that decide together on a channel's weight (the paper's k)
GUIDE_INIT_SCALE = 0.1  # guides start nearly flat, so that training starts near an ordinary convolution
OUTPUT_INIT_SCALE = 0.1  # 16 residual sums later, outputs of unit scale would leave the streams' exact range


def round_to_quantum(x: Tensor) -> Tensor:
    """Rounds to the nearest multiple of STREAM_QUANTUM; the gradient passes straight through."""
    return _RoundToQuantum.apply(x)


def round_to_quantum_(x: Tensor) -> Tensor:
    """The same in place, without gradients."""
    return x.div_(STREAM_QUANTUM).round_().mul_(STREAM_QUANTUM)


class _RoundToQuantum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # Compiled by PyTorch 2.11, a function that ends with an operation in place has a gradient of zero.
        return (x / STREAM_QUANTUM).round_() * STREAM_QUANTUM

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class DualPoolingChannelAttention(nn.Module):
    """DPCA (Fig. 3): pooling to 50 x 50, then to one, convolution over channels, sigmoid, scaling.

    Called as module(x, dtype, grad_addend), x [B,C,H,W]: returns what the convolution after it reads, in dtype,
    channels last, and one pixel wider on every side, by reflection. grad_addend, if any, is added to the gradient of x.
    """

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv1d(1, 1, ATTENTION_TAPS, bias=False)  # for its initialisation
        self.weight = nn.Parameter(convolution.weight.detach().reshape(ATTENTION_TAPS).clone())

    def forward(self, x: Tensor, dtype: torch.dtype, grad_addend: Tensor | None = None) -> Tensor:
        return dual_pool_attention_pad2d(x, self.weight, padding=1, dtype=dtype, grad_addend=grad_addend)


class PixelAdaptiveFeatureExtraction(nn.Module):
    """CAFE (Fig. 4): guide and value from one input, then a pixel-adaptive convolution (eq. 5) of the value.

    Called as module(pad, residual, alpha, in_place), pad() being x with a pixel more on every side, which is freed as
    soon as it is read: returns residual + alpha * CAFE(x), CAFE(x) rounded to the streams' quantum; with in_place, in
    residual's memory. With adaptive=False an ordinary convolution of the same shape takes the place of the
    pixel-adaptive one.
    """

    def __init__(self, channels: int, adaptive: bool = True) -> None:
        super().__init__()
        self.value_channels = channels // 4
        # One convolution for both: each alone has too few outputs to keep a processor busy.
        self.value_and_guide = nn.Conv2d(channels, self.value_channels + (GUIDE_CHANNELS if adaptive else 0), 3)
        with torch.no_grad():
            self.value_and_guide.weight[self.value_channels :].mul_(GUIDE_INIT_SCALE)
        output = nn.Conv2d(self.value_channels, channels, 3)  # for its initialisation
        self.adaptive = adaptive
        self.weight = nn.Parameter(output.weight.detach() * OUTPUT_INIT_SCALE)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, pad: Callable[[], Tensor], residual: Tensor, alpha: float, in_place: bool = False) -> Tensor:
        if not self.adaptive:
            output = conv2d(F.relu(self._value_and_guide(pad)), self.weight, self.bias, padding=1)
            change = alpha * round_to_quantum(output.to(residual.dtype))
            return residual.add_(change) if in_place else residual + change
        tensors = (*relu_split(self._value_and_guide(pad), self.value_channels), self.weight, self.bias)
        options = {"padding": 1, "alpha": alpha, "quantum": STREAM_QUANTUM}
        if in_place:
            return pac_conv2d_(residual, *tensors, **options)
        return pac_conv2d(*tensors, residual=residual, **options)

    def _value_and_guide(self, pad: Callable[[], Tensor]) -> Tensor:
        return conv2d(pad(), self.value_and_guide.weight, self.value_and_guide.bias)


class ReversibleBlock(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 (eq. 1-4), F = DPCA then CAFE; the halves swap roles on leaving.

    forward and inverse take and return two [B,C,H,W] streams whose values are multiples of STREAM_QUANTUM below
    STREAM_LIMIT; inverse(*forward(a, b)) is then (a, b) bit for bit, whatever the precision F computes in. With
    in_place, where no gradients are recorded, the stream that changes may be written over, and with it what a hook kept
    of the block before.
    """

    def __init__(self, channels: int, dpca: bool = True, cafe: bool = True) -> None:
        super().__init__()
        self.attention = DualPoolingChannelAttention() if dpca else None
        self.features = PixelAdaptiveFeatureExtraction(channels, adaptive=cafe)

    def add(
        self, residual: Tensor, x: Tensor, alpha: float, grad_addend: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        """residual + alpha · F(x), for streams [B,C,H,W], alpha 1 or -1; with in_place, residual may be written over.

        grad_addend, of the shape of x, is added to the gradient of x: what reaches x by another way.
        """
        # One memory layout both ways: libraries choose the order of a sum by strides, and F must repeat to the bit.
        x = x.contiguous()
        in_place = in_place and residual.is_contiguous()
        return self.features(lambda: self._padded(x, grad_addend), residual, alpha, in_place)

    def _padded(self, x: Tensor, grad_addend: Tensor | None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.attention is not None:
            return self.attention(x, dtype, grad_addend)
        if grad_addend is not None:
            x = x.view_as(x)  # of this use of x alone
            x.register_hook(lambda gradient: gradient + grad_addend)
        # Without autocast, which pads in float32 on a CPU: two more copies of x, and two of its gradient.
        with torch.autocast(kind, enabled=False):
            return F.pad(x.to(dtype, memory_format=torch.channels_last), (1, 1, 1, 1), mode="reflect")

    def forward(self, first: Tensor, second: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        return second, self.add(first, second, 1.0, in_place=in_place)

    def inverse(self, first: Tensor, second: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        return self.add(second, first, -1.0, in_place=in_place), first
