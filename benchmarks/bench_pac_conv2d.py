"""Pixel-adaptive convolution, beside what one writes without a kernel for it and beside an ordinary convolution."""

import torch
import torch.nn.functional as F

from benchmarks.contest import Contest, Rival
from restoration_kernels import _samples


def traffic(x, guide, weight, bias, **geometry):
    """Forward reads x and guide and writes y; backward reads them again and grad_y, and writes their gradients."""
    output = F.conv2d(x[:, :1], weight[:1, :1], **geometry)[0, 0].numel() * x.shape[0] * weight.shape[0]
    images, parameters = x.nbytes + guide.nbytes, weight.nbytes + bias.nbytes
    forward = images + parameters + output * x.element_size()
    return {"forward": forward, "forward+backward": 2 * forward + images + parameters}


def unfold(x, guide, weight, bias, padding, dilation=1, stride=1):
    """As pacnet has it: the columns of x, scaled by a kernel that is made of the columns of the guide."""
    K = weight.shape[-1]
    columns, guides = (F.unfold(image, K, dilation, padding, stride).unflatten(1, (-1, K * K)) for image in (x, guide))
    kernel = (guides - guides[:, :, K * K // 2, None]).square().sum(1).mul_(-0.5).exp_()
    scaled = (columns * kernel[:, None]).flatten(1, 2)
    output = torch.baddbmm(bias[:, None], weight.flatten(1).expand(x.shape[0], -1, -1), scaled)
    rows = (x.shape[2] + 2 * padding - dilation * (K - 1) - 1) // stride + 1
    return output.unflatten(2, (rows, -1))


def scaled_taps(x, guide, K, padding, dilation, stride):
    """x at p + t, times k_t(p), [B, H', W', C], for one tap after the other: views of the padded images."""
    values, guides = (F.pad(image.permute(0, 2, 3, 1), (0, 0, *(padding,) * 4)) for image in (x, guide))
    last_row, last_column = (values.shape[axis] - dilation * (K - 1) for axis in (1, 2))

    def tap(image, row, column):
        row, column = row * dilation, column * dilation
        return image[:, row : row + last_row : stride, column : column + last_column : stride]

    centre = tap(guides, K // 2, K // 2)
    for row in range(K):
        for column in range(K):
            value = tap(values, row, column)
            if (row, column) == (K // 2, K // 2):
                yield value
            else:
                distance = (centre - tap(guides, row, column)).square().sum(-1, keepdim=True)
                yield value * distance.mul_(-0.5).exp_()


def taps(x, guide, weight, bias, padding, dilation=1, stride=1):
    """Channels last, all taps in one product: of the plain formulations the fastest with gradients."""
    columns = torch.cat(list(scaled_taps(x, guide, weight.shape[-1], padding, dilation, stride)), -1)
    return F.linear(columns, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def taps_added(x, guide, weight, bias, padding, dilation=1, stride=1):
    """Channels last, each tap added in place: of the plain formulations the leanest without gradients."""
    factors = weight.permute(2, 3, 1, 0).flatten(0, 1)
    output = None
    for value, factor in zip(scaled_taps(x, guide, weight.shape[-1], padding, dilation, stride), factors, strict=True):
        if output is None:
            output = bias.expand(value[..., 0].numel(), -1)
            shape = (*value.shape[:-1], -1)
            output = torch.addmm(output, value.flatten(0, 2), factor)
        else:
            output.addmm_(value.flatten(0, 2), factor)
    return output.view(shape).permute(0, 3, 1, 2)


def convolution(x, guide, weight, bias, **geometry):
    """An ordinary convolution of the same shape."""
    return F.conv2d(x, weight, bias, **geometry)


def channels_last(arguments):
    """The arguments in the layout that a caller would keep them in for the sake of the rival."""
    return {
        name: value.contiguous(memory_format=torch.channels_last)
        if torch.is_tensor(value) and value.dim() == 4
        else value
        for name, value in arguments.items()
    }


def sample(side):
    """The first and largest maps of the network."""
    make = _samples._pac_conv2d(1, 4, 16, 8, side, side, 3, padding=1)
    return _samples.Sample("pac_conv2d", f"series_{side}", "series", make)


TAPS = [Rival("taps", taps, channels_last, compiled=True), Rival("taps added", taps_added, channels_last)]
FLOORS = [
    Rival("conv2d", convolution, floor=True),
    Rival("conv2d channels last", convolution, channels_last, floor=True),
]
CONTESTS = [
    Contest(
        "pac_conv2d",
        traffic,
        series=[sample(side) for side in (64, 256, 1024)],
        rivals=[Rival("unfold", unfold), *TAPS, *FLOORS],
    ),
    Contest("pac_conv2d", traffic, rivals=[*TAPS, *FLOORS], dtypes=[torch.bfloat16]),
]


def test_speed(measure, entry):
    measure(entry)
