"""SSIM and Gram losses against their definitions."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from restoration.metrics import (
    colour_difference,
    gram_losses,
    gram_matrices,
    limit_side,
    measure,
    newly_clipped,
    structural_similarity_index,
    tint_difference,
)
from restoration.vgg import metric_features


def picture(*size, seed=0):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def test_ssim_is_wangs_formula():
    a, b = picture(40, 33), picture(40, 33, seed=1)
    values = []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):

        def blur(image):
            return gaussian_filter(image, 1.5, truncate=3.5)

        mean_x, mean_y = blur(x), blur(y)
        variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        index = ((2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)) / (
            (mean_x**2 + mean_y**2 + 1e-4) * (variance_x + variance_y + 9e-4)
        )
        values.append(index[5:-5, 5:-5].mean())  # where the 11-pixel window lies inside
    assert structural_similarity_index(a, b) == pytest.approx(np.mean(values), abs=1e-5)
    assert structural_similarity_index(a, a) == 1


def test_gram_losses_by_hand():
    reference = [torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.float64)]
    result = [torch.tensor([[2.0, 2.0], [2.0, 5.0]], dtype=torch.float64)]
    assert gram_losses(result, reference) == pytest.approx((1 / 4, 1 / 34))


def test_gram_matrix_is_feature_products_over_their_number():
    features = metric_features()
    image = picture(16, 24)
    feature = features(image[None])[1][0].flatten(1).double()
    expected = feature @ feature.T / feature.numel()
    assert torch.allclose(gram_matrices(image, features)[1], expected, rtol=1e-4)


def test_equal_pictures_are_perfect_and_sizes_may_differ():
    features = metric_features()
    image = picture(24, 24)
    metrics = measure(image, image, image, features)
    assert (metrics.ssim, metrics.gram, metrics.relative_gram) == (1, 0, 0)
    assert measure(image, picture(17, 33), image, features).relative_gram > 0


def test_large_pictures_are_reduced_first(monkeypatch):
    features = metric_features()
    pictures = [picture(48, 40, seed=seed) for seed in range(3)]
    expected = measure(*(limit_side(image, 32) for image in pictures), features)
    monkeypatch.setattr("restoration.metrics.MEASURED_SIDE", 32)
    assert measure(*pictures, features) == expected


def test_one_pixel():
    pixel = picture(1, 1)
    assert measure(pixel, pixel, pixel, metric_features()).ssim == 1


def test_ssim_of_sides_under_the_window_is_that_of_replicated_edges():
    a, b = picture(8, 20), picture(8, 20, seed=1)
    larger = [torch.cat((image, image[:, -1:].expand(-1, 3, -1)), 1) for image in (a, b)]
    assert structural_similarity_index(a, b) == structural_similarity_index(*larger)


def test_limit_side_keeps_proportions_and_leaves_out_no_pixel():
    assert limit_side(picture(300, 100), 150).shape == (3, 150, 50)
    image = picture(10, 20)
    assert limit_side(image, 20) is image
    assert limit_side(picture(64, 64), 16).std() < 0.1 < 0.25 < picture(64, 64).std()


def test_ciede2000_of_greys_is_its_lightness_term():
    """Greys have no chroma: what is left is the difference of L* over S_L (Sharma, Wu, Dalal 2005, eq. 15)."""
    dark, light = (torch.full((3, 2, 5), value) for value in (0.5, 0.6))

    def lightness(value):
        return 116 * (((value + 0.055) / 1.055) ** 2.4) ** (1 / 3) - 16

    middle = ((lightness(0.5) + lightness(0.6)) / 2 - 50) ** 2
    weight = 1 + 0.015 * middle / (20 + middle) ** 0.5
    assert colour_difference(dark, light) == pytest.approx((lightness(0.6) - lightness(0.5)) / weight, abs=0.01)


def test_tint_ignores_lightness_and_size():
    """sRGB red is at a* = 80.1, b* = 67.2 (CIELAB under D65); greys have neither."""
    grey, light = torch.full((3, 4, 4), 0.3), torch.full((3, 2, 7), 0.9)
    red = torch.zeros(3, 5, 5)
    red[0] = 1
    assert tint_difference(grey, light) < 0.01
    assert tint_difference(light, red) == pytest.approx(np.hypot(80.1, 67.2), abs=0.1)


def test_newly_clipped_counts_pixels_that_eight_bits_store_as_an_extreme():
    degraded = torch.full((3, 1, 4), 0.5)
    degraded[0, 0, 0] = 0.0
    result = degraded.clone()
    result[0, 0, :3] = torch.tensor([0.0, 0.4 / 255, 1 - 0.4 / 255])
    result[:, 0, 3] = 0.6 / 255
    assert newly_clipped(degraded, result) == 0.5
