"""The objective: each term against its formula, the matting clamp, the switches."""

import pytest
import torch
from compare import kept_for_backward

from restoration.losses import (
    LossWeights,
    ReconstructionLoss,
    channel_statistics,
    clamped_matting_loss,
    style_loss,
)
from restoration.vgg import loss_features
from restoration_kernels import ccpl_loss, matting_laplacian_energy


def pictures(count, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 2, 3, 8, 8, generator=generator)
    return [torch.nn.functional.interpolate(one, size=(side, side), mode="bicubic").clamp(0, 1) for one in coarse]


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("temperature", [{}, {"temperature": 0.2}], ids=["default", "given"])
def test_the_four_terms(temperature):
    degraded, reference, result, cycled = pictures(4)
    objective = ReconstructionLoss(loss_features(), anchors=4, **temperature)
    losses = objective(degraded, reference, result, cycled, generator())

    features = loss_features()
    projections = objective.contrast.projections
    outputs, targets, styles = (features(image) for image in (result, degraded, reference))
    expected = {
        "ccp": 5 * ccpl_loss(outputs, targets, 4, **temperature, projections=projections, generator=generator()),
        "style": sum(
            (a.mean((2, 3)) - b.mean((2, 3))).square().mean()
            + ((a.var((2, 3), correction=0) + 1e-5).sqrt() - (b.var((2, 3), correction=0) + 1e-5).sqrt())
            .square()
            .mean()
            for a, b in zip(outputs, styles, strict=True)
        ),
        "matting": 1500 * matting_laplacian_energy(result, degraded).mean(),
        "cycle": 10 * (cycled - degraded).abs().mean(),
    }
    assert losses.keys() == expected.keys()
    for name in losses:
        assert torch.allclose(losses[name], expected[name], rtol=1e-5), name


def test_l2_style_distance_is_eq_8_as_printed():
    outputs, styles = ([torch.rand(3, 5, 6, 7, dtype=torch.float64)] for _ in range(2))

    def deviation(x):
        return (x.var((1, 2), correction=0) + 1e-5).sqrt()

    norms = [
        (a.mean((1, 2)) - b.mean((1, 2))).norm() + (deviation(a) - deviation(b)).norm()
        for a, b in zip(outputs[0], styles[0], strict=True)
    ]
    expected = sum(norms) / 3
    computed = style_loss(outputs, [channel_statistics(style) for style in styles], "l2")
    assert torch.allclose(computed, expected)


def test_channel_statistics_are_mean_and_deviation():
    feature = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    mean, deviation = channel_statistics(feature)
    variance, expected_mean = torch.var_mean(feature, dim=(2, 3), correction=0)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(deviation, (variance + 1e-5).sqrt())
    assert torch.autograd.gradcheck(channel_statistics, feature)
    # Of float32 features with a mean far from zero: no difference of large sums.
    far = 1000 + torch.randn(1, 2, 64, 64)
    exact = (far.double().var((2, 3), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(channel_statistics(far)[1].double(), exact, rtol=1e-5, atol=0)


def test_statistics_keep_their_feature_alone():
    feature = torch.rand(1, 4, 32, 32, requires_grad=True)
    assert sum(kept.nbytes for kept in kept_for_backward(channel_statistics, feature)) < 1.1 * feature.nbytes


def test_matting_gradient_is_clamped_for_each_image_before_the_mean():
    degraded, _, result, _ = pictures(4)
    result = result.double().requires_grad_()
    degraded = degraded.double()
    (plain,) = torch.autograd.grad(1500 * matting_laplacian_energy(result, degraded).sum(), result)
    clamped_matting_loss(result, degraded, 1500.0).backward()
    assert (plain.abs() > 0.05).any() and (plain.abs() < 0.05).any()
    expected = plain.clamp(-0.05, 0.05) / 2
    assert torch.allclose(result.grad, expected, rtol=1e-9)


def test_the_clamp_leaves_other_gradients_alone():
    degraded, _, result, _ = pictures(4)
    result.requires_grad_()
    (clamped_matting_loss(result, degraded, 1500.0) + 100 * result.sum()).backward()
    assert (result.grad > 99).all()


def test_only_result_cycle_and_heads_get_gradients():
    degraded, reference, result, cycled = (image.requires_grad_() for image in pictures(4))
    objective = ReconstructionLoss(loss_features(), anchors=4)
    losses = objective(degraded.detach(), reference, result, cycled, generator())
    sum(losses.values()).backward()
    assert reference.grad is None
    assert result.grad.abs().max() > 0 and cycled.grad.abs().max() > 0
    for name, parameter in objective.named_parameters():
        assert "projections" in name and parameter.grad is not None


def test_what_is_wanted_of_the_result_keeps_no_maps_of_the_reference():
    targets, _ = ReconstructionLoss(loss_features(), anchors=4)._constants(*pictures(2))
    assert all(target.untyped_storage().nbytes() == target.nbytes for target in targets)


@pytest.mark.parametrize("side", [24, 40])
def test_small_crops_take_fewer_anchors(side):
    losses = ReconstructionLoss(loss_features(), anchors=64)(*pictures(4, side), generator())
    assert all(value.isfinite() for value in losses.values())


def test_ccpl_switch_weights_and_style_distance():
    images = pictures(4)
    objective = ReconstructionLoss(loss_features(), ccpl=False)
    assert not list(objective.parameters())
    losses = objective(*images)
    assert losses.keys() == {"style", "matting", "cycle"}
    double = ReconstructionLoss(loss_features(), LossWeights(cycle=20.0), ccpl=False)(*images)
    assert torch.allclose(double["cycle"], 2 * losses["cycle"])
    printed = ReconstructionLoss(loss_features(), ccpl=False, style_distance="l2")(*images)
    _, reference, result, _ = images
    style = [channel_statistics(feature) for feature in loss_features()(reference)]
    torch.testing.assert_close(printed["style"], style_loss(loss_features()(result), style, "l2"))


def test_rejects_unknown_style_distances():
    message = "distance must be one of mse, l2, got 'l1'"
    with pytest.raises(ValueError, match=f"style_loss: {message}"):
        style_loss([], [], "l1")
    with pytest.raises(ValueError, match=f"ReconstructionLoss: style_{message}"):
        ReconstructionLoss(loss_features(), style_distance="l1")


def test_a_reference_of_another_size_is_the_style_as_well():
    degraded, reference, result, cycled = pictures(4)
    narrow = reference[..., :24]
    objective = ReconstructionLoss(loss_features(), anchors=4)
    losses = objective(degraded, narrow, result, cycled, generator())
    style = [channel_statistics(feature) for feature in loss_features()(narrow)]
    torch.testing.assert_close(losses["style"], style_loss(loss_features()(result), style))
    torch.testing.assert_close(losses["ccp"], objective(degraded, reference, result, cycled, generator())["ccp"])


def test_flat_pictures_have_finite_gradients():
    flat = torch.full((1, 3, 32, 32), 0.5)
    result = flat.clone().requires_grad_()
    sum(ReconstructionLoss(loss_features(), anchors=4)(flat, flat, result, result, generator()).values()).backward()
    assert result.grad.isfinite().all()
