"""Files of weights: round trips, refusals, atomic writing."""

import pickle

import pytest
import safetensors.torch
import torch

from restoration.checkpoints import FORMAT, load_checkpoint, load_network, save_checkpoint, save_network
from restoration.errors import UserError
from restoration.flow import Architecture, ReversibleNetwork

SMALL = Architecture(half_channels=4, blocks_per_stage=1, refinement_blocks=1)


def test_network_round_trip(tmp_path):
    network = ReversibleNetwork(SMALL)
    path = tmp_path / "weights.safetensors"
    save_network(path, network, {"step": 3})
    loaded = load_network(path)
    assert loaded.architecture == SMALL
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    description = load_checkpoint(path).description
    assert description["step"] == 3 and description["versions"]["torch"] == torch.__version__


def test_shipped_weights_load_and_are_small():
    from restoration.checkpoints import SHIPPED_WEIGHTS

    assert SHIPPED_WEIGHTS.stat().st_size <= 20e6
    assert load_network().architecture == Architecture()
    checkpoint = load_checkpoint(SHIPPED_WEIGHTS)
    assert all(tensor.dtype == torch.float16 for tensor in checkpoint.tensors.values())


def test_shipped_weights_invert_exactly():
    network = load_network()
    x = torch.randint(0, 256, (1, 3, 21, 30), generator=torch.Generator().manual_seed(0)) / 255
    for precision in ("fp32", "bf16"):
        network.precision = precision
        with torch.no_grad():
            restored = network.decode(network.encode(x), (21, 30))
            assert torch.equal(restored, torch.round(x * 2**16) / 2**16)
            assert (network(x, x).image - x).abs().max() < 1 / 255


def test_a_changed_bit_is_found(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_network(path, ReversibleNetwork(SMALL), {"step": 3})
    whole = path.read_bytes()
    for place in (len(whole) - 1, whole.index(b'step\\": 3') + len(b'step\\": ')):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is damaged: its contents are not those that were written"):
            load_checkpoint(path)


def test_a_changed_name_shape_or_dtype_is_found(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(path, {"a": torch.zeros(1, 23)}, {})
    whole = path.read_bytes()
    for before, after in ((b'"a":', b'"b":'), (b"[1,23]", b"[23,1]"), (b'"F32"', b'"I32"')):
        assert whole.count(before) == 1
        path.write_bytes(whole.replace(before, after))
        with pytest.raises(UserError, match="is damaged: its contents are not those that were written"):
            load_checkpoint(path)


def refusals(folder):
    whole = folder / "whole.safetensors"
    save_network(whole, ReversibleNetwork(SMALL), {})
    cut = folder / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    foreign = folder / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, foreign)
    pickled = folder / "pickled.pt"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    other = folder / "other.safetensors"
    tensors = {f"network.{name}": tensor for name, tensor in ReversibleNetwork(SMALL).state_dict().items()}
    save_checkpoint(other, tensors, {"architecture": Architecture(4, 2, 1).to_dict()})
    unknown = folder / "unknown.safetensors"
    save_checkpoint(unknown, tensors, {"architecture": {"transformer_layers": 12}})
    infinite = folder / "infinite.safetensors"
    first = next(iter(tensors))
    save_checkpoint(infinite, {**tensors, first: tensors[first] * torch.inf}, {"architecture": SMALL.to_dict()})
    described = {"bare": {}, "broken": {"description": "{"}, "listed": {"description": "[]"}}
    for name, metadata in described.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors", {"format": FORMAT, **metadata})
    negative = folder / "negative.safetensors"
    save_checkpoint(negative, tensors, {"architecture": {"half_channels": -4}})
    narrow = folder / "narrow.safetensors"
    save_checkpoint(narrow, {**tensors, first: tensors[first].to(torch.float8_e5m2)}, {"architecture": SMALL.to_dict()})
    return [
        (folder / "missing.safetensors", "no such checkpoint"),
        (folder, "is a folder, must be a checkpoint"),
        *((folder / f"{name}.safetensors", "its description") for name in described),
        (negative, "another architecture"),
        (narrow, "holds weights of torch.float8_e5m2"),
        (cut, "not a readable safetensors file"),
        (foreign, "not a checkpoint of this program"),
        (pickled, "pickled checkpoints are never loaded"),
        (other, "another architecture"),
        (unknown, "another architecture"),
        (infinite, "not finite"),
    ]


def test_refusals(tmp_path):
    for path, message in refusals(tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            load_network(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
