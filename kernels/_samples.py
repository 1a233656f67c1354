"""Sample inputs of every operator: one source for tests, checks of registrations, benchmarks and the backend table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Sample:
    """A call of an operator.

    Of size "tiny" for definitions in loops, "odd" for kernels, "model" for benchmarks, or "series" in a file of
    benchmarks, for its curves over the number of pixels or rows.
    """

    operator: str
    name: str
    size: str
    make: Callable[[torch.Generator], dict]

    def arguments(self, dtype=torch.float32, device="cpu"):
        """Keyword arguments of the public function, the same for every dtype but for rounding."""
        return convert(self.make(torch.Generator().manual_seed(0)), dtype, device)


# What every backend of an operator differentiates by.
DIFFERENTIABLE = {
    "pac_conv2d": ("x", "guide", "weight", "bias", "residual"),
    "neighbor_difference": ("features",),
    "info_nce": ("query",),
    "matting_laplacian_energy": ("image",),
    "matting_laplacian_apply": ("image",),
    "dual_pool_attention": ("x", "weight"),
    "dual_pool_attention_pad2d": ("x", "weight"),
    "relu_split": ("x",),
}


def samples(operator, *sizes):
    """The samples of an operator, of all sizes or of those named."""
    return [sample for sample in _SAMPLES if sample.operator == operator and (not sizes or sample.size in sizes)]


def convert(arguments, dtype, device):
    """The arguments with floating tensors in this dtype and all tensors on this device."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


def _pac_conv2d(B, C, O, G, H, W, K, *, bias=True, shared=False, residual=False, **options):
    def make(generator):
        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        arguments = dict(
            x=normal(B, C, H, W),
            # Neighbours of unit distance on average: kernel values around exp(-1/2), none of them negligible.
            guide=normal(B, G, H, W) / (2 * G) ** 0.5,
            weight=normal(*((1, 1) if shared else (O, C)), K, K) / (K * K if shared else C * K * K) ** 0.5,
            bias=normal(O) if bias else None,
            **options,
        )
        if residual:
            geometry = {name: options[name] for name in ("stride", "padding", "dilation") if name in options}
            output = F.conv2d(arguments["x"][:, :1], arguments["weight"][:1, :1], **geometry)
            arguments["residual"] = normal(B, O, *output.shape[2:])
        return arguments

    return make


def _neighbor_difference(B, C, H, W, N):
    def make(generator):
        rows = torch.randint(1, H - 1, (N,), generator=generator)
        anchors = rows * W + torch.randint(1, W - 1, (N,), generator=generator)
        steps = torch.tensor([-W - 1, -W, -W + 1, -1, 1, W - 1, W, W + 1])
        features = torch.randn(B, C, H, W, generator=generator)
        return dict(features=features, anchors=anchors, neighbors=anchors[:, None] + steps)

    return make


def _info_nce(B, S, D, temperature=0.07):
    def make(generator):
        query, key = F.normalize(torch.randn(2, B, S, D, generator=generator), dim=-1)
        return dict(query=query, key=key, temperature=temperature)

    return make


def _matting_laplacian(B, C, H, W, *, colour=1.0, **options):
    """colour: distance of the guide's channels from their grey mean; an ink painting's are nearly equal."""

    def make(generator):
        grey = torch.rand(B, 1, H, W, generator=generator)
        guide = grey + colour * (torch.rand(B, 3, H, W, generator=generator) - grey)
        return dict(image=torch.rand(B, C, H, W, generator=generator), guide=guide, **options)

    return make


def _dual_pool_attention(B, C, H, W, k=5, **options):
    def make(generator):
        return dict(
            x=torch.randn(B, C, H, W, generator=generator), weight=torch.randn(k, generator=generator), **options
        )

    return make


def _relu_split(B, C, H, W, channels):
    """x as a convolution leaves it."""

    def make(generator):
        return dict(x=torch.randn(B, H, W, C, generator=generator).permute(0, 3, 1, 2), channels=channels)

    return make


_SAMPLES = [
    Sample("pac_conv2d", "residual", "tiny", _pac_conv2d(2, 2, 3, 2, 6, 5, 3, residual=True, alpha=-0.5, stride=2)),
    Sample("pac_conv2d", "same", "tiny", _pac_conv2d(2, 3, 4, 2, 5, 6, 3, padding=1)),
    Sample("pac_conv2d", "stride", "tiny", _pac_conv2d(1, 2, 3, 3, 7, 8, 3, bias=False, stride=(2, 3), alpha=2.0)),
    Sample("pac_conv2d", "five_taps", "tiny", _pac_conv2d(1, 2, 2, 1, 5, 4, 5, padding=4, dilation=(1, 2))),
    Sample("pac_conv2d", "normalize", "tiny", _pac_conv2d(1, 2, 3, 2, 4, 5, 3, padding=(2, 1), normalize=True)),
    Sample("pac_conv2d", "no_tap_inside", "tiny", _pac_conv2d(1, 2, 3, 2, 3, 4, 3, padding=3, normalize=True)),
    Sample("pac_conv2d", "shared", "tiny", _pac_conv2d(2, 3, 3, 2, 4, 5, 3, padding=1, shared=True)),
    Sample("pac_conv2d", "one_pixel", "tiny", _pac_conv2d(1, 3, 2, 2, 1, 1, 3, padding=1)),
    Sample("pac_conv2d", "odd", "odd", _pac_conv2d(2, 16, 24, 8, 37, 61, 3, padding=1)),
    Sample("pac_conv2d", "odd_stride", "odd", _pac_conv2d(1, 5, 7, 8, 37, 61, 5, stride=2, padding=4, dilation=2)),
    Sample("pac_conv2d", "4_to_16_at_512", "model", _pac_conv2d(1, 4, 16, 8, 512, 512, 3, padding=1)),
    Sample("pac_conv2d", "16_to_64_at_256", "model", _pac_conv2d(1, 16, 64, 8, 256, 256, 3, padding=1)),
    Sample("pac_conv2d", "64_to_256_at_128", "model", _pac_conv2d(1, 64, 256, 8, 128, 128, 3, padding=1)),
    Sample("pac_conv2d", "16_to_16_at_512", "model", _pac_conv2d(2, 16, 16, 16, 512, 512, 3, padding=1)),
    Sample("pac_conv2d", "dilation_4_at_256", "model", _pac_conv2d(1, 16, 64, 8, 256, 256, 3, padding=4, dilation=4)),
    Sample("pac_conv2d", "stride_2_at_256", "model", _pac_conv2d(1, 16, 64, 8, 256, 256, 3, padding=1, stride=2)),
    Sample("pac_conv2d_", "same", "tiny", _pac_conv2d(2, 3, 4, 2, 5, 6, 3, padding=1, residual=True)),
    Sample("pac_conv2d_", "shared", "tiny", _pac_conv2d(1, 3, 3, 2, 5, 6, 3, shared=True, residual=True, alpha=-1.0)),
    Sample("pac_conv2d_", "odd", "odd", _pac_conv2d(2, 16, 24, 8, 37, 61, 3, padding=1, residual=True)),
    Sample("neighbor_difference", "small", "tiny", _neighbor_difference(2, 3, 5, 6, 4)),
    Sample("neighbor_difference", "one_place", "tiny", _neighbor_difference(1, 2, 3, 3, 1)),
    Sample("neighbor_difference", "odd", "odd", _neighbor_difference(2, 17, 37, 61, 64)),
    Sample("neighbor_difference", "relu1_1_of_512", "model", _neighbor_difference(1, 64, 512, 512, 64)),
    Sample("neighbor_difference", "relu4_1_of_512", "model", _neighbor_difference(1, 512, 64, 64, 64)),
    Sample("info_nce", "small", "tiny", _info_nce(2, 6, 4)),
    Sample("info_nce", "warm", "tiny", _info_nce(1, 5, 3, temperature=1.0)),
    Sample("info_nce", "one_row", "tiny", _info_nce(1, 1, 2)),
    Sample("info_nce", "odd", "odd", _info_nce(2, 133, 37)),
    Sample("info_nce", "odd_rows_of_vectors", "odd", _info_nce(2, 133, 40)),
    Sample("info_nce", "64_anchors", "model", _info_nce(1, 512, 128)),
    Sample("info_nce", "1024_anchors", "model", _info_nce(1, 8192, 128)),
]
for _name in ("matting_laplacian_energy", "matting_laplacian_apply"):
    _SAMPLES += [
        Sample(_name, "colour", "tiny", _matting_laplacian(2, 3, 4, 5)),
        Sample(_name, "grey", "tiny", _matting_laplacian(1, 1, 5, 4, colour=1e-3)),
        Sample(_name, "radius_2", "tiny", _matting_laplacian(1, 2, 5, 6, radius=2, eps=1e-4)),
        Sample(_name, "one_window", "tiny", _matting_laplacian(1, 3, 3, 3)),
        Sample(_name, "odd", "odd", _matting_laplacian(2, 3, 37, 61)),
        Sample(_name, "odd_grey", "odd", _matting_laplacian(1, 3, 61, 37, colour=1e-3)),
        Sample(_name, "512", "model", _matting_laplacian(1, 3, 512, 512, colour=0.1)),
    ]
_SAMPLES += [
    Sample("dual_pool_attention", "overlapping_bins", "tiny", _dual_pool_attention(2, 3, 4, 5, pool_size=3)),
    Sample("dual_pool_attention", "smaller_than_bins", "tiny", _dual_pool_attention(1, 4, 3, 4)),
    Sample("dual_pool_attention", "one_pixel", "tiny", _dual_pool_attention(1, 3, 1, 1)),
    Sample("dual_pool_attention", "odd", "odd", _dual_pool_attention(2, 7, 61, 137)),
    Sample("dual_pool_attention", "16_at_512", "model", _dual_pool_attention(1, 16, 512, 512)),
    Sample("dual_pool_attention", "256_at_128", "model", _dual_pool_attention(1, 256, 128, 128)),
    Sample("dual_pool_attention_pad2d", "overlapping_bins", "tiny", _dual_pool_attention(2, 3, 4, 5, pool_size=3)),
    Sample("dual_pool_attention_pad2d", "two_pixels", "tiny", _dual_pool_attention(1, 4, 3, 4, padding=2)),
    Sample("dual_pool_attention_pad2d", "one_pixel", "tiny", _dual_pool_attention(1, 3, 1, 1, padding=0)),
    Sample("dual_pool_attention_pad2d", "odd", "odd", _dual_pool_attention(2, 39, 61, 137, padding=3)),
    Sample("dual_pool_attention_pad2d", "16_at_512", "model", _dual_pool_attention(1, 16, 512, 512)),
    Sample("dual_pool_attention_pad2d", "256_at_128", "model", _dual_pool_attention(1, 256, 128, 128)),
    Sample("relu_split", "small", "tiny", _relu_split(2, 5, 3, 4, 3)),
    Sample("relu_split", "one_pixel", "tiny", _relu_split(1, 2, 1, 1, 1)),
    Sample("relu_split", "odd", "odd", _relu_split(2, 19, 7, 137, 5)),
    Sample("relu_split", "4_and_8_at_512", "model", _relu_split(1, 12, 512, 512, 4)),
    Sample("relu_split", "64_and_8_at_128", "model", _relu_split(1, 72, 128, 128, 64)),
]
