import numpy as np
import pytest
from skimage.color import rgb2lab

from restoration.samples import PALETTES, SAMPLE_SEEDS, draw_painting, fade, sample_pair

# Large enough for every motif to show, small enough to be drawn in a fifth of a second.
HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="module", params=list(PALETTES))
def painting(request):
    return draw_painting(request.param, 7, HEIGHT, WIDTH)


def lightness_spread(picture):
    return rgb2lab(picture)[..., 0].std()


def chroma_over_ground(picture):
    """Mean distance in CIELAB's a and b from the picture's median: varnish, which tints all alike, adds none."""
    chroma = rgb2lab(picture)[..., 1:]
    return np.hypot(*np.moveaxis(chroma - np.median(chroma, axis=(0, 1)), -1, 0)).mean()


def cool_share(picture):
    """Share of pixels more blue or green than red."""
    return (picture[..., 1:].max(axis=-1).astype(int) > picture[..., 0] + 10.0).mean()


def test_same_seed_same_bytes(painting):
    first = draw_painting("blue_green", 1, HEIGHT, WIDTH)
    np.testing.assert_array_equal(draw_painting("blue_green", 1, HEIGHT, WIDTH), first)
    np.testing.assert_array_equal(fade(painting, 3), fade(painting, 3))


def test_seeds_differ(painting):
    assert not np.array_equal(draw_painting("ochre", 1, HEIGHT, WIDTH), draw_painting("ochre", 2, HEIGHT, WIDTH))
    assert not np.array_equal(fade(painting, 1), fade(painting, 2))


def test_palettes_hold_their_colours():
    assert cool_share(draw_painting("blue_green", 7, HEIGHT, WIDTH)) > 0.25
    assert cool_share(draw_painting("ochre", 7, HEIGHT, WIDTH)) < 0.05


@pytest.mark.parametrize("height, width", [(64, 64), (65, 97), (160, 64), (64, 300)])
def test_sizes(height, width):
    picture = draw_painting("blue_green", 0, height, width)
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8
    # Neither blank nor burnt out: ink and silk are both there.
    assert picture.min() < 80
    assert picture.max() > 200


def test_every_seed_draws():
    for seed in range(4):
        assert lightness_spread(draw_painting("blue_green", seed, 64, 80)) > 5


def test_fading_takes_chroma_and_contrast(painting):
    faded = fade(painting, 5)
    assert lightness_spread(faded) < 0.75 * lightness_spread(painting)
    assert chroma_over_ground(faded) < 0.75 * chroma_over_ground(painting)


def test_fading_takes_most_from_blue_and_green():
    picture = np.full((96, 96, 3), 120, np.uint8)
    azurite, crimson = np.s_[10:40, 30:66], np.s_[56:86, 30:66]
    picture[azurite], picture[crimson] = (40, 90, 170), (170, 90, 40)

    def distance_from_grey(lab, patch):
        return np.linalg.norm((lab[patch] - np.median(lab, axis=(0, 1)))[..., 1:].mean(axis=(0, 1)))

    before, after = rgb2lab(picture), rgb2lab(fade(picture, 0))
    kept = [distance_from_grey(after, patch) / distance_from_grey(before, patch) for patch in (azurite, crimson)]
    # An equal loss for all hues would leave more of the blue than of the red, by these distances.
    assert kept[0] < 0.9 * kept[1]


def test_varnish_yellows_white():
    white = np.full((64, 96, 3), 255, np.uint8)
    red, green, blue = fade(white, 0).reshape(-1, 3).mean(axis=0)
    assert red > green > blue


def test_fading_grows_with_strength(painting):
    np.testing.assert_array_equal(fade(painting, 5, 0.0), painting)
    distances = [np.abs(fade(painting, 5, strength) - painting.astype(float)).mean() for strength in (0.25, 0.5, 1.0)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 40, 3), (40, 1, 3)])
def test_fading_takes_any_size(shape):
    assert fade(np.full(shape, 128, np.uint8), 0).shape == shape


@pytest.mark.parametrize("palette", list(PALETTES))
def test_sample_pair(palette):
    faded, reference = sample_pair(palette, HEIGHT, WIDTH)
    seed = SAMPLE_SEEDS[palette][0]
    np.testing.assert_array_equal(faded, fade(draw_painting(palette, seed, HEIGHT, WIDTH), seed))
    assert lightness_spread(faded) < lightness_spread(reference)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("purple", 0), "palette must be one of blue_green, ochre, got 'purple'"),
        (("ochre", -1), "seed must be a whole number of at least 0, got -1"),
        (("ochre", 0.5), "seed must be a whole number of at least 0, got 0.5"),
        (("ochre", 0, 63, 64), "height must be a whole number of at least 64, got 63"),
        (("ochre", 0, 64, 64.5), "width must be a whole number of at least 64, got 64.5"),
    ],
)
def test_drawing_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_painting(*arguments)


@pytest.mark.parametrize(
    "painting, seed, strength, message",
    [
        (np.zeros((8, 8, 3)), 0, 1, r"painting must be uint8 \[H,W,3\] and not empty, got float64 \[8, 8, 3\]"),
        (np.zeros((8, 8), np.uint8), 0, 1, r"painting must be .*, got uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), 0, 1, r"painting must be .*, got uint8 \[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), 0, 1, "not empty"),
        (np.zeros((8, 8, 3), np.uint8), -2, 1, "seed must be .*, got -2"),
        (np.zeros((8, 8, 3), np.uint8), 0, 1.5, r"strength must lie in \[0,1\], got 1.5"),
        (np.zeros((8, 8, 3), np.uint8), 0, float("nan"), "strength must lie in .*, got nan"),
    ],
)
def test_fading_rejects(painting, seed, strength, message):
    with pytest.raises(ValueError, match=message):
        fade(painting, seed, strength)


def test_sample_pair_rejects():
    with pytest.raises(ValueError, match=r"palette must be .*, got 'purple'"):
        sample_pair("purple")
