"""The training objective, eq. 6: 5 L_ccp + 1 L_s + 1500 L_m + 10 L_cyc."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restoration.differentiation import differentiable_once
from restoration.parts import part
from restoration.vgg import LAYER_CHANNELS, VGG19Features
from restoration_kernels import CCPLoss, ccpl_loss, matting_laplacian_energy

STYLE_DISTANCES = ("mse", "l2")
MATTING_GRADIENT_LIMIT = 0.05  # a pixel, for the weighted loss of one image: CAP-VSTNet's clamp, it steadies training
VARIANCE_FLOOR = 1e-5  # under the root of a standard deviation, whose slope is infinite at zero


@dataclass(frozen=True)
class LossWeights:
    """Weights of eq. 6."""

    ccp: float = 5.0
    style: float = 1.0
    matting: float = 1500.0
    cycle: float = 10.0


class ReconstructionLoss(nn.Module):
    """The four weighted losses of a recoloured painting; their sum is the objective.

    features must be channel-normalised with reflection padding (`vgg.loss_features`). The projection heads of L_ccp
    are parameters of this module and are trained with the network; projection=False leaves them out, ccpl=False L_ccp
    altogether (ablation). anchors, temperature: of L_ccp; style_distance: as of `style_loss`.
    """

    def __init__(
        self,
        features: VGG19Features,
        weights: LossWeights | None = None,
        *,
        ccpl: bool = True,
        anchors: int = 64,
        temperature: float = 0.07,
        projection: bool = True,
        style_distance: str = "mse",
    ) -> None:
        super().__init__()
        _check_distance("ReconstructionLoss: style_distance", style_distance)
        self.features = features
        self.weights = weights or LossWeights()
        self.style_distance = style_distance
        self.contrast = CCPLoss(LAYER_CHANNELS, anchors, temperature, projection) if ccpl else None

    def forward(
        self,
        degraded: Tensor,
        reference: Tensor,
        result: Tensor,
        cycled: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """All [B,3,H,W] in about [0,1]; cycled is the result with the degraded painting's colours given back.

        Returns scalars named ccp, style, matting and cycle, already weighted. generator draws L_ccp's anchors.
        """
        with part("loss network"):
            targets, style = self._constants(degraded, reference)
            outputs = self.features(result)

        losses = {}
        with part("style loss"):
            losses["style"] = self.weights.style * style_loss(outputs, style, self.style_distance)
        with part("matting loss"):
            losses["matting"] = clamped_matting_loss(result, degraded, self.weights.matting)
        with part("cycle loss"):
            losses["cycle"] = self.weights.cycle * (cycled - degraded).abs().mean()
        if self.contrast is not None:
            with part("contrastive loss"):
                losses["ccp"] = self.weights.ccp * self._contrastive(outputs, targets, generator)
        return losses

    @torch.no_grad()
    def _constants(self, degraded: Tensor, reference: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of the degraded painting and channel statistics of the reference's, in one batch if sizes agree."""
        if degraded.shape != reference.shape:
            return self.features(degraded), [channel_statistics(feature) for feature in self.features(reference)]
        both, targets, style = self.features(torch.cat((degraded, reference))), [], []
        while both:
            # Layer by layer, and copied: else the maps of the reference would live as long as those of the targets.
            target, other = both.pop(0).chunk(2)
            targets.append(target.clone())
            style.append(channel_statistics(other))
        return targets, style

    def _contrastive(self, outputs: list[Tensor], targets: list[Tensor], generator: torch.Generator | None) -> Tensor:
        """L_ccp, with fewer anchors where a small crop has fewer interior places."""
        interiors = [(output.shape[2] - 2) * (output.shape[3] - 2) for output in outputs]
        return ccpl_loss(
            outputs,
            targets,
            [min(self.contrast.num_anchors, interior) for interior in interiors],
            self.contrast.temperature,
            projections=self.contrast.projections,
            generator=generator,
        )


def style_loss(outputs: list[Tensor], style: list[tuple[Tensor, Tensor]], distance: str = "mse") -> Tensor:
    """L_s (eq. 8): distance of channel means plus that of channel standard deviations, summed over layers.

    outputs are features [B,C,H,W], style the channel_statistics of those wanted. 'mse' is the mean over channels and
    batch of the squared difference; 'l2' the batch's mean Euclidean norm, as printed in eq. 8.
    """
    _check_distance("style_loss: distance", distance)

    def difference(computed: Tensor, wanted: Tensor) -> Tensor:
        delta = computed - wanted
        return delta.square().mean() if distance == "mse" else delta.norm(dim=1).mean()

    return sum(
        difference(computed, wanted)
        for output, statistics in zip(outputs, style, strict=True)
        for computed, wanted in zip(channel_statistics(output), statistics, strict=True)
    )


def _check_distance(argument: str, distance: str) -> None:
    if distance not in STYLE_DISTANCES:
        raise ValueError(f"{argument} must be one of {', '.join(STYLE_DISTANCES)}, got {distance!r}")


def channel_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the pixels of [B,C,H,W], each [B,C]."""
    variance, mean = _ChannelMoments.apply(feature)
    return mean, (variance + VARIANCE_FLOOR).sqrt()


class _ChannelMoments(torch.autograd.Function):
    """torch.var_mean over the pixels, without correction; faster on a CPU, forward and backward."""

    @staticmethod
    def forward(ctx, feature: Tensor) -> tuple[Tensor, Tensor]:
        mean = feature.mean((2, 3), keepdim=True)
        variance = (feature - mean).square_().mean((2, 3))
        ctx.save_for_backward(feature, mean)
        return variance, mean[..., 0, 0]

    @staticmethod
    @differentiable_once("channel_statistics: has no second derivatives")
    def backward(ctx, grad_variance: Tensor, grad_mean: Tensor) -> Tensor:
        feature, mean = ctx.saved_tensors
        pixels = feature.shape[2] * feature.shape[3]
        slope = (2 / pixels) * grad_variance[..., None, None]
        return torch.addcmul(grad_mean[..., None, None] / pixels - slope * mean, feature, slope)


def clamped_matting_loss(result: Tensor, degraded: Tensor, weight: float) -> Tensor:
    """weight * L_m (eq. 9), batch mean; each image's gradient is clamped to ±MATTING_GRADIENT_LIMIT a pixel.

    The clamp sits on a view of the result that only this loss reads, so one backward pass serves all losses.
    """
    B = result.shape[0]
    image = result.view_as(result)
    if image.requires_grad:
        limit = MATTING_GRADIENT_LIMIT / B  # the batch mean has divided each image's gradient by B already
        image.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return weight * matting_laplacian_energy(image, degraded.detach()).mean()
