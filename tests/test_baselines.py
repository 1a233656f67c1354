"""Colour transfers without training: the statistics that each must reach, and pictures that offer none."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from restoration.baselines import (
    BASELINES,
    LMS_TO_LALPHABETA,
    RGB_TO_LMS,
    histogram_matching,
    monge_kantorovich,
    reinhard,
    untouched,
)


def picture(height, width, seed, low=0.35, high=0.65):
    """Correlated colours far enough from black and white that nothing is clipped."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
    mixed = torch.einsum("ij,jhw->ihw", torch.eye(3, dtype=torch.float64) + 0.5, values) / 2.5
    return low + (high - low) * mixed


CONTENT = picture(40, 30, 0)
STYLE = picture(25, 50, 1, low=0.4, high=0.6) * torch.tensor([1.1, 1.0, 0.8])[:, None, None]


def moments(values):
    return values.mean(1), torch.cov(values, correction=0)


def test_monge_kantorovich_reaches_mean_and_covariance():
    result = monge_kantorovich(CONTENT, STYLE)
    mean, covariance = moments(result.flatten(1))
    wanted_mean, wanted_covariance = moments(STYLE.flatten(1))
    assert torch.allclose(mean, wanted_mean, atol=1e-12)
    # The rounding's variance, 1.3e-6, is added to the content's, about 4e-3.
    assert torch.allclose(covariance, wanted_covariance, rtol=2e-3, atol=1e-6)


def test_monge_kantorovich_is_the_published_map():
    content, style = (torch.cov(image.flatten(1), correction=0).numpy() for image in (CONTENT, STYLE))
    root = sqrtm(content)
    matrix = np.linalg.inv(root) @ sqrtm(root @ style @ root) @ np.linalg.inv(root)
    centred = CONTENT.flatten(1) - CONTENT.flatten(1).mean(1, keepdim=True)
    expected = torch.from_numpy(matrix) @ centred + STYLE.flatten(1).mean(1, keepdim=True)
    assert torch.allclose(monge_kantorovich(CONTENT, STYLE).flatten(1), expected, atol=1e-4)


def test_reinhard_reaches_mean_and_deviation_in_its_space():
    def statistics(image):
        axes = LMS_TO_LALPHABETA @ (RGB_TO_LMS @ image.flatten(1)).log10()
        return torch.cat((axes.mean(1), axes.std(1, correction=0)))

    assert torch.allclose(statistics(reinhard(CONTENT, STYLE)), statistics(STYLE), atol=1e-9)


def test_reinhards_space_is_rudermans():
    """l, alpha and beta are orthogonal; grey has neither alpha nor beta, but for the matrix's four digits."""
    assert torch.allclose(LMS_TO_LALPHABETA @ LMS_TO_LALPHABETA.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    grey = LMS_TO_LALPHABETA @ (RGB_TO_LMS @ torch.full((3, 1), 0.5, dtype=torch.float64)).log10()
    assert grey[1:].abs().max() < 2e-3


def test_histogram_matching_reaches_each_channels_distribution():
    style = picture(40, 30, 2)
    result = histogram_matching(CONTENT, style)
    assert torch.allclose(result.flatten(1).sort(1).values, style.flatten(1).sort(1).values, atol=1e-12)
    assert torch.equal(result[0].flatten().argsort(), CONTENT[0].flatten().argsort())


def test_untouched_is_untouched():
    assert untouched(CONTENT, STYLE) is CONTENT


@pytest.mark.parametrize("name", BASELINES)
def test_any_picture_gives_a_picture(name):
    """One pixel, one colour, black, white and noise, in any combination."""
    pictures = [
        torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(0)),
        torch.full((3, 5, 7), 0.3),
        torch.zeros(3, 4, 4),
        torch.ones(3, 4, 4),
        torch.rand(3, 9, 6, generator=torch.Generator().manual_seed(1)),
    ]
    for degraded in pictures:
        for reference in pictures:
            before = degraded.clone()
            result = BASELINES[name](degraded, reference)
            assert result.shape == degraded.shape and result.dtype == torch.float32
            assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1
            assert torch.equal(degraded, before)
            assert torch.equal(result, BASELINES[name](degraded, reference))


@pytest.mark.parametrize("name", BASELINES)
def test_after_itself_a_picture_stays(name):
    assert torch.allclose(BASELINES[name](CONTENT, CONTENT), CONTENT, atol=1e-4)
