"""The transfer of moments: whitened covariance, fallbacks, regions, several references, strength."""

import pytest
import torch
from compare import kept_for_backward

from restoration.blocks import STREAM_QUANTUM
from restoration.whitening import (
    RIDGE_LADDER,
    Transfer,
    _pieces,
    blend,
    moments,
    moments_of_parts,
    regularised_cholesky,
    transfer_moments,
    transfer_parts_,
    transfer_statistics,
)


def encoded(*size, channels=6, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, channels, size[0] * size[1], generator=generator, dtype=torch.float64)
    return (mixing @ noise + torch.arange(channels, dtype=torch.float64)[:, None]).reshape(batch, channels, *size)


def assert_moments_equal(z, style, tolerance):
    for computed, wanted in zip(
        (moments(z).mean, moments(z).covariance), (moments(style).mean, moments(style).covariance), strict=True
    ):
        assert (computed - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_moments_agree_with_numpys():
    z = encoded(9, 11)
    computed = moments(z)
    flat = z[0].flatten(1)
    assert torch.allclose(computed.mean[0], flat.mean(1), rtol=1e-12)
    assert torch.allclose(computed.covariance[0], torch.cov(flat, correction=0), rtol=1e-12)


def test_moments_do_not_depend_on_the_pieces(monkeypatch):
    z = encoded(20, 30)
    whole = moments(z)
    monkeypatch.setattr("restoration.whitening.CHUNK", 64)
    pieces = moments(z)
    assert torch.allclose(whole.mean, pieces.mean, rtol=1e-13)
    assert torch.allclose(whole.covariance, pieces.covariance, rtol=1e-13)


def test_pieces_take_eight_mebibytes_at_most():
    z = torch.zeros(1, 32, 2048, 64)
    assert max(piece.nbytes for piece, _ in _pieces([z], None)) <= 8 * 2**20


def test_moments_keep_z_alone():
    z = encoded(20, 20).float().requires_grad_()
    assert sum(kept.nbytes for kept in kept_for_backward(moments, z)) < 1.1 * z.nbytes


def test_parts_are_treated_as_the_whole(monkeypatch):
    monkeypatch.setattr("restoration.whitening.CHUNK", 64)
    content, style = encoded(24, 25), moments(encoded(30, 10, seed=1))
    own = moments(content)
    parts = [part.clone() for part in content.split((2, 4), 1)]
    found = moments_of_parts(parts)
    assert torch.equal(found.mean, own.mean)
    assert torch.equal(found.covariance, own.covariance)
    expected = transfer_moments(content, own, style, 0.7)
    ridges = transfer_parts_(parts, own, style, 0.7)
    assert torch.allclose(torch.cat(parts, 1), expected.z, atol=1e-6)
    assert [int(ridge) for ridge in ridges] == [int(expected.content_ridge), int(expected.style_ridge)]


def test_transfer_reaches_the_styles_moments():
    content, style = encoded(24, 25, batch=2), encoded(30, 10, batch=2, seed=1)
    transfer = transfer_statistics(content, style)
    assert_moments_equal(transfer.z, style, 1e-4)  # the ridge of 1e-6 trace/C is all that separates them
    assert transfer.content_ridge.tolist() == [0, 0]
    assert int(transfer.fallbacks()) == 0


def test_identity_whitening():
    """Transferred to unit moments, the covariance is the identity."""
    content = encoded(40, 40)
    C = content.shape[1]
    unit = moments(content)
    unit = type(unit)(torch.zeros_like(unit.mean), torch.eye(C, dtype=torch.float64)[None])
    covariance = moments(transfer_moments(content, moments(content), unit).z).covariance[0]
    assert torch.allclose(covariance, torch.eye(C, dtype=torch.float64), atol=1e-3)


def test_a_spread_of_four_stream_quanta_is_no_rounding():
    style = encoded(30, 10)
    faint = 4 * STREAM_QUANTUM * torch.randn(1, 6, 40, 40, dtype=torch.float64)
    assert_moments_equal(transfer_statistics(faint, style).z, style, 0.05)


def test_own_moments_leave_the_picture_as_it_is():
    content = encoded(24, 25).float()
    assert torch.equal(transfer_statistics(content, content).z, content)


def test_strength_scales_the_change():
    content, style = encoded(10, 12), encoded(9, 9, seed=3)
    full = transfer_statistics(content, style).z
    assert torch.equal(transfer_statistics(content, style, strength=0.0).z, content)
    half = transfer_statistics(content, style, strength=0.5).z
    assert torch.allclose(half, (content + full) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (16, 16)])
def test_flat_and_tiny_pictures_survive(size):
    flat = torch.full((1, 32, *size), 0.25)
    style = encoded(16, 16, channels=32).float()
    for content, reference in ((flat, style), (style, flat), (flat, flat)):
        transfer = transfer_statistics(content, reference)
        assert transfer.z.isfinite().all()


def test_an_indefinite_covariance_climbs_the_ladder_and_says_so():
    covariance = torch.diag(torch.tensor([1.0, 1.0, -5e-3], dtype=torch.float64)).expand(2, 3, 3).clone()
    covariance[1] = torch.eye(3)
    factor, rung = regularised_cholesky(covariance)
    assert rung.tolist() == [2, 0]
    assert RIDGE_LADDER[rung[0]] == 1e-2
    assert factor.isfinite().all()


def test_fallbacks_of_content_and_of_style_count():
    assert int(Transfer(torch.zeros(3), torch.tensor([1, 0, 0]), torch.tensor([0, 2, 0])).fallbacks()) == 2


def test_what_no_ridge_factors_is_counted_and_gives_nan():
    """Garbage in place of NaN would be trained on."""
    covariance = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    covariance[1, 2, 2] = float("inf")
    factor, rung = regularised_cholesky(covariance)
    assert rung.tolist() == [0, len(RIDGE_LADDER)]
    assert factor[0].isfinite().all() and factor[1].isnan().all()


def test_gradients_stay_finite_on_the_ladder():
    z = torch.full((1, 4, 3, 3), 0.5, requires_grad=True)
    style = encoded(5, 5, channels=4).float().requires_grad_()
    transfer_statistics(z, style).z.square().sum().backward()
    assert z.grad.isfinite().all()
    assert style.grad.isfinite().all()


def test_gradcheck(monkeypatch):
    monkeypatch.setattr("restoration.whitening.CHUNK", 7)  # leaves a rest
    content, style = (encoded(4, 5, channels=3, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: transfer_statistics(a, b).z, (content, style))
    mask = torch.arange(20).reshape(4, 5) % 3 > 0
    assert torch.autograd.gradcheck(lambda z: tuple(vars(moments(z, mask)).values()), (content,))


def test_several_references_blend_their_moments():
    content, first, second = encoded(20, 20), encoded(20, 20, seed=1), encoded(16, 25, seed=2)
    only_first = transfer_statistics(content, [first, second], weights=[1, 0]).z
    assert torch.allclose(only_first, transfer_statistics(content, first).z, rtol=1e-12, atol=1e-12)
    mixed = transfer_statistics(content, [first, second], weights=[1, 3]).z
    wanted = 0.25 * moments(first).mean + 0.75 * moments(second).mean
    assert torch.allclose(moments(mixed).mean, wanted, rtol=1e-9)


def test_regions_take_the_statistics_of_their_label():
    content, style = encoded(12, 12), encoded(14, 10, seed=5)
    content_labels = torch.zeros(12, 12, dtype=torch.long)
    content_labels[:, 6:] = 1
    style_labels = torch.zeros(14, 10, dtype=torch.long)
    style_labels[7:] = 1
    z = transfer_statistics(content, style, content_labels=content_labels, style_labels=style_labels).z
    for label in (0, 1):
        inside = moments(z, content_labels == label)
        wanted = moments(style, style_labels == label)
        assert torch.allclose(inside.mean, wanted.mean, rtol=1e-9)
        assert torch.allclose(inside.covariance, wanted.covariance, rtol=1e-3, atol=1e-3)


def test_a_label_without_partner_takes_the_whole_reference():
    content, style = encoded(12, 12), encoded(14, 10, seed=5)
    labels = torch.full((12, 12), 7)
    z = transfer_statistics(content, style, content_labels=labels, style_labels=torch.zeros(14, 10)).z
    assert torch.allclose(z, transfer_statistics(content, style).z, rtol=1e-9, atol=1e-9)


def test_a_label_that_one_of_two_references_has_takes_the_statistics_of_that_one():
    content, first, second = encoded(12, 12), encoded(14, 10, seed=5), encoded(9, 9, seed=6)
    labels = {"content_labels": torch.ones(12, 12), "style_labels": [torch.ones(14, 10), torch.zeros(9, 9)]}
    z = transfer_statistics(content, [first, second], **labels).z
    assert torch.allclose(z, transfer_statistics(content, first).z, rtol=1e-9, atol=1e-9)


def test_regions_tell_the_largest_of_their_ridges(monkeypatch):
    monkeypatch.setattr("restoration.whitening.RIDGE_LADDER", (-2.0, 1.0))  # the first is for flat regions alone
    z = encoded(8, 8)
    z[..., 4:] = 0.5
    flat = (z == 0.5).all(1)[0]
    for labels in (flat.long(), 1 - flat.long()):
        transfer = transfer_statistics(z, z, content_labels=labels, style_labels=labels)
        assert (int(transfer.content_ridge), int(transfer.style_ridge)) == (1, 1)


def test_transfers_of_what_is_nearly_flat_are_exact():
    """Deviations of some quanta are enlarged ten thousand times: in float32, but not the rounding of whole values."""
    for spread in (0, 1, 4, 16):
        noise = torch.randint(-spread, spread + 1, (1, 32, 24, 24), generator=torch.Generator().manual_seed(spread))
        faint = 0.3 + STREAM_QUANTUM * noise
        style = encoded(20, 20, channels=32)
        exact = transfer_statistics(faint.double(), style).z
        assert (transfer_statistics(faint, style).z - exact).abs().max() < 1e-6 * exact.abs().max(), spread


def test_rejects():
    z = encoded(4, 4)
    for strength in (-0.5, 1.5):
        for caller, arguments in (
            (transfer_statistics, (z, z)),
            (transfer_moments, (z, moments(z), moments(z))),
            (transfer_parts_, ([z], moments(z), moments(z))),
        ):
            message = rf"^{caller.__name__}: strength must lie in \[0, 1\], got {strength}"
            with pytest.raises(ValueError, match=message):
                caller(*arguments, strength=strength)
    with pytest.raises(ValueError, match="one entry a reference"):
        transfer_statistics(z, [z, z], weights=[1.0])
    labels = torch.zeros(4, 4)
    both = {"content_labels": labels, "style_labels": [labels, labels]}
    for weights in ([0.0, 0.0], [2.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="blend: weights must be non-negative"):
            blend([moments(z)] * 2, weights)
        with pytest.raises(ValueError, match="transfer_statistics: weights must be non-negative"):
            transfer_statistics(z, [z, z], weights=weights, **both)
    for content, styles, message in (
        (z, [], "styles must hold at least one reference, got none"),
        (z, [z, z[:, :5]], r"styles must be of shape \[B, 6, h, w\], got shape \[1, 5, 4, 4\]"),
        (z, z.expand(2, -1, -1, -1), "styles must have a batch of 1 or of content's, 1, got 2"),
        (z[0], z, r"content must be of shape \[B, C, H, W\], got shape \[6, 4, 4\]"),
    ):
        with pytest.raises(ValueError, match=f"^transfer_statistics: {message}$"):
            transfer_statistics(content, styles)
    with pytest.raises(ValueError, match="style_labels must be given"):
        transfer_statistics(z, z, content_labels=labels)
    with pytest.raises(ValueError, match="content_labels must be given"):
        transfer_statistics(z, z, style_labels=labels)
    with pytest.raises(ValueError, match=r"style_labels must have one entry a reference \(2\), got 1"):
        transfer_statistics(z, [z, z], content_labels=labels, style_labels=labels)
    for name, wrong in (("content_labels", labels[:1]), ("style_labels", [labels, labels[None]])):
        with pytest.raises(ValueError, match=rf"{name} must be of shape \[4, 4\], got \[1, 4"):
            transfer_statistics(z, [z, z], **{**both, name: wrong})
