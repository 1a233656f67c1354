"""Recolouring a picture after another: tensors on both sides, whose files `reconstruct` reads and writes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from restoration.errors import UnsuitableWeightsError
from restoration.flow import ReversibleNetwork, check_colours, check_stream_range
from restoration.memory import telling_of_memory
from restoration.whitening import RIDGE_LADDER, Moments, moments_of_parts, transfer_parts_
from restoration_kernels import _require as require

# Convolutions see zeros past the edge, which shows as a coloured frame some pixels wide after the transfer. With the
# edge carried on this far, the frame falls outside of the picture.
MARGIN = 16


@torch.no_grad()
def recolour(
    network: ReversibleNetwork,
    degraded: Tensor,
    reference: Tensor,
    device: torch.device,
    strength: float = 1.0,
    *,
    visible: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, tuple[str, ...]]:
    """degraded [3,H,W] after reference [3,h,w], in [0,1], on the CPU; any sizes. Returns the same kind, and notes.

    visible: the pixels [H,W] and [h,w], bool, whose colours count; None, or no more than the code's channels: all.
    UserError where memory does not suffice, UnsuitableWeightsError where these weights cannot treat the picture,
    ValueError where a picture is not as said here.
    """
    for name, image in (("degraded", degraded), ("reference", reference)):
        require.tensor("recolour", name, image, (3, "H", "W"), dtypes=(torch.float32,))
        check_colours("recolour", name, image)
    pixels = max(degraded[0].numel(), reference[0].numel()) / 1e6
    place = "this computer's memory; reduce it" if device.type == "cpu" else "this GPU; take --device cpu"
    try:
        with telling_of_memory(f"a picture of {pixels:.1f} megapixels does not fit {place}"):
            # One code at a time: each takes 128 bytes a pixel.
            own, wanted = visible
            style = _moments_inside(network.encode_halves(_with_margin(reference).to(device)), reference, wanted)
            code = network.encode_halves(_with_margin(degraded).to(device))
            ridges = transfer_parts_(code, _moments_inside(code, degraded, own), style, strength)
            check_stream_range(*code)
            result = _inside(network.decode_halves(code), degraded)[0]
    except OverflowError as error:
        raise UnsuitableWeightsError(str(error)) from error
    if not result.isfinite().all():
        raise UnsuitableWeightsError(
            "the result holds values that are not finite: these weights do not suit this picture"
        )
    result = fit_range(result).cpu()
    return result, _notes(degraded, result, rung=int(torch.maximum(*ridges).max()))


# A faded drawing is taken to have kept more than a quarter of the reference's contrast; noise alone has less.
NOTED_GAIN = 4


def _notes(degraded: Tensor, result: Tensor, rung: int) -> tuple[str, ...]:
    """What the user should know of a result. rung: of the ridge that its statistics needed."""
    notes = []
    if rung > 0:
        notes.append(
            f"colours nearly flat: statistics were regularised with {RIDGE_LADDER[rung]:g} in place of "
            f"{RIDGE_LADDER[0]:g}"
        )
    before, after = (picture.var((1, 2), correction=0).mean().sqrt().item() for picture in (degraded, result))
    if after > NOTED_GAIN * before:
        notes.append(
            f"hardly any drawing: values deviate by {before * 255:.1f} of 255, and by {after * 255:.1f} in the result, "
            "noise and dirt included"
        )
    return tuple(notes)


# Values further than this from black and white stay as they are; the 13 steps of 8 bits that are nearer take in what
# lay outside.
KNEE = 0.05


def fit_range(image: Tensor) -> Tensor:
    """[3,H,W] of any finite values, in [0,1]: shades past black or white are compressed, not cut off to one.

    A channel that reaches -m < 0 takes every value x below KNEE to KNEE - t / (1 + t m / (KNEE (KNEE + m))), with
    t = KNEE - x: tangent to the identity at KNEE, -m becomes 0, shades keep their order. A channel that exceeds 1 is
    treated likewise at white. Values in [KNEE, 1 - KNEE], and channels within [0,1], are returned bit for bit; values
    in [0,1] move by at most KNEE / 2.
    """
    return (image + _lift(image) - _lift(1 - image)).clamp(0, 1)


def _lift(image: Tensor) -> Tensor:
    """What is added near black; as a difference, since x - (x - KNEE) would round values that need no change."""
    excess = (-image.amin((1, 2), keepdim=True)).clamp_min(0)
    below = (KNEE - image).clamp_min(0)
    bend = below * excess / (KNEE * (KNEE + excess))
    return below * bend / (1 + bend)


def _with_margin(image: Tensor) -> Tensor:
    """[3,H,W] with its edges replicated on all sides, as a batch of one."""
    return F.pad(image[None], (MARGIN,) * 4, mode="replicate")


def padded_pixels(image: Tensor) -> int:
    """How many a picture [3,H,W] has where the network sees it."""
    height, width = image.shape[-2:]
    return (height + 2 * MARGIN) * (width + 2 * MARGIN)


def _inside(padded: Tensor, image: Tensor) -> Tensor:
    """The part of padded [1,C,H',W'] that image [3,H,W] covers."""
    height, width = image.shape[-2:]
    return padded[..., MARGIN : MARGIN + height, MARGIN : MARGIN + width]


def _moments_inside(code: list[Tensor], image: Tensor, visible: Tensor | None) -> Moments:
    """Of the visible part of the picture without its margin, unless it has too few pixels for a covariance."""
    channels = sum(half.shape[1] for half in code)
    if (image[0].numel() if visible is None else int(visible.sum())) <= channels:
        return moments_of_parts(code)
    return moments_of_parts([_inside(half, image) for half in code], visible)
