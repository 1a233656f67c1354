"""Backpropagation through rebuilt activations: bits of what is rebuilt, gradients, what is kept, and when."""

import copy
import functools
import weakref

import pytest
import torch

from restoration.blocks import STREAM_QUANTUM, ReversibleBlock
from restoration.flow import _JOIN, _SPLIT, Architecture, ReversibleNetwork
from restoration.reversible import Coupling, Gradients, Rearrangement, run_chain
from restoration_kernels import _backend, use_backend

PRECISIONS = ("fp32", "bf16")


def network(reversible=True, precision="fp32", blocks=2, **switches):
    torch.manual_seed(0)
    return ReversibleNetwork(Architecture(4, blocks, 1, **switches), precision, reversible)


def picture(*size, dtype=torch.float32):
    return torch.rand(2, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(0))


def both_ways(net, image):
    """A number that depends on all that encode and decode return, and has no gradient that is zero."""
    z = net.encode(image)
    result = net.decode(z + 0.5 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)), image.shape[-2:])
    return (z.square() * torch.arange(z.shape[-1])).mean() + result.square().mean()


def gradients(net, image, compute=both_ways):
    image = image.clone().requires_grad_()
    names, parameters = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(compute(net, image), (image, *parameters))
    return dict(zip(("image", *names), found, strict=True))


def assert_equal_gradients(net, other, image, tolerance, compute=both_ways):
    assert_close(gradients(net, image, compute), gradients(other, image, compute), tolerance)


def assert_close(ours, expected, tolerance=1e-5):
    """Gradients by name."""
    # A guide's bias changes no difference of guides: its gradient is rounding alone.
    least = 1e-6 * max(gradient.abs().max() for gradient in expected.values())
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        scale = expected[name].abs().max().clamp_min(least)
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("switches", [{}, {"dpca": False}, {"cafe": False}], ids=str)
def test_gradients_are_those_of_plain_autograd(precision, switches):
    """The activations are the same to the bit, so that only the order of sums may differ, in bfloat16 as well."""
    nets = (network(reversible, precision, **switches) for reversible in (True, False))
    assert_equal_gradients(*nets, picture(13, 17), 1e-5)


def test_gradients_in_float64():
    nets = (network(reversible).double() for reversible in (True, False))
    assert_equal_gradients(*nets, picture(9, 12, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_every_step_rebuilds_its_input_bit_for_bit(precision, direction):
    net = network(precision=precision, blocks=3)
    streams = [picture(16, 20).div(STREAM_QUANTUM).round().mul(STREAM_QUANTUM)]
    steps = net._encoding([_JOIN])
    with net._residual_precision(torch.device("cpu")):
        if direction == "decode":
            with torch.no_grad():
                streams = run_chain(steps, streams)
            steps = net._decoding([_SPLIT])
        for step in steps:
            with torch.no_grad():
                left = step.run(list(streams))
            rebuilt, _, _ = step.backward(left, Gradients(tuple(map(torch.ones_like, left))), step.evaluation())
            for tensor, expected in zip(rebuilt, streams, strict=True):
                assert torch.equal(tensor, expected), step
            streams = left


def test_steps_without_parameters():
    x = torch.rand(1, 2, 4, 4, requires_grad=True)
    (y,) = run_chain([Rearrangement(lambda s: (s.flip(3),), lambda s: (s.flip(3),))], [x])
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_without_gradients_what_steps_made_is_written_over():
    made, streams = [], [torch.zeros(1, 8, 5, 5) for _ in range(2)]
    copies = Rearrangement(lambda *given: made.extend(map(torch.clone, given)) or tuple(made), None)
    with torch.no_grad():
        found = run_chain([copies, Coupling(ReversibleBlock(8))], streams)
    assert {stream.data_ptr() for stream in found} == {stream.data_ptr() for stream in made}


def test_backward_evaluates_the_residual_function_once():
    block = ReversibleBlock(8)
    calls = []
    block.features.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    streams = tuple(torch.zeros(1, 8, 5, 5) for _ in range(2))
    coupling = Coupling(block)
    coupling.backward(streams, Gradients(streams), coupling.evaluation())
    assert calls == [True]


class LiveBytes:
    """Bytes that autograd holds: as saved tensors are made and dropped, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        class Kept:
            value = tensor

        kept = Kept()
        self._change(tensor.nbytes)
        weakref.finalize(kept, self._change, -tensor.nbytes)
        return kept

    def _change(self, by):
        self.now += by
        self.most = max(self.most, self.now)


def most_kept(reversible, blocks):
    live = LiveBytes()
    net = network(reversible, blocks=blocks)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda kept: kept.value):
        both_ways(net, picture(32, 32)).backward()
    return live.most


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_that_changes_before_backward_is_an_error(trained):
    net = network()
    parameter = next(net.parameters()).requires_grad_(trained)
    loss = both_ways(net, picture(8, 8))
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match="a parameter was changed in place since forward"):
        loss.backward()


def test_memory_does_not_grow_with_depth():
    assert most_kept(True, 8) <= 1.05 * most_kept(True, 4)
    assert most_kept(False, 8) > 1.7 * most_kept(False, 4)
    assert most_kept(True, 8) < most_kept(False, 8) / 10


def test_each_parameter_gets_its_gradient_once_a_backward_pass():
    net = network()
    arrivals = dict.fromkeys((name for name, _ in net.named_parameters()), 0)
    for name, parameter in net.named_parameters():

        def arrived(_, name=name):
            arrivals[name] += 1

        parameter.register_post_accumulate_grad_hook(arrived)
    both_ways(net, picture(8, 8)).backward()
    assert set(arrivals.values()) == {1}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "plain"])
def test_a_hook_of_a_parameter_sees_its_gradient_once(precision, reversible):
    net = network(reversible, precision)
    expected = gradients(net, picture(8, 8))
    calls = []

    def double(gradient):
        calls.append(gradient)
        return 2 * gradient

    own = list(net.parameters())
    for parameter in own:
        parameter.register_hook(double)
    for name, gradient in gradients(net, picture(8, 8)).items():
        assert torch.equal(gradient, expected[name] if name == "image" else 2 * expected[name]), name
    assert len(calls) == len(expected) - 1
    assert_same_tensors(net.parameters(), own)


def assert_same_tensors(parameters, own):
    assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in own]


def test_a_backward_pass_that_fails_leaves_the_module_its_parameters(monkeypatch):
    net = network()
    own = list(net.parameters())
    for parameter in own:
        parameter.register_hook(lambda gradient: gradient)
    loss = both_ways(net, picture(8, 8))

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(ReversibleBlock, "add", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        loss.backward()
    assert_same_tensors(net.parameters(), own)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_of_functional_calls(precision):
    """Two calls with parameters that are not the module's, differentiated when it has its own again."""

    def of(reversible):
        net = network(reversible, precision)
        parameters = [
            {name: (factor * parameter.detach()).requires_grad_() for name, parameter in net.named_parameters()}
            for factor in (0.5, 2.0)
        ]
        module = Encoder(net)
        results = [
            torch.func.functional_call(
                module, {f"network.{name}": value for name, value in each.items()}, picture(8, 8)
            )
            for each in parameters
        ]
        flat = {f"{call} {name}": value for call, each in enumerate(parameters) for name, value in each.items()}
        found = torch.autograd.grad(sum(result.square().mean() for result in results), list(flat.values()))
        return dict(zip(flat, found, strict=True))

    assert_close(of(True), of(False))


def test_a_functional_call_leaves_frozen_parameters_frozen():
    net = network().requires_grad_(False)
    given = {f"network.{name}": value.detach().requires_grad_() for name, value in net.named_parameters()}
    torch.func.functional_call(Encoder(net), given, picture(8, 8)).square().mean().backward()
    assert not any(parameter.requires_grad for parameter in net.parameters())


class Encoder(torch.nn.Module):
    """What calls to a network go through that must be forward."""

    def __init__(self, net):
        super().__init__()
        self.network = net

    def forward(self, image):
        return self.network.encode(image)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("replace", ["data", "assign"])
def test_parameters_replaced_before_backward(precision, replace):
    """Gradients are those of the numbers that forward has seen."""
    net = network(precision=precision)
    image = picture(8, 8).requires_grad_()
    parameters = list(net.parameters())
    expected = torch.autograd.grad(both_ways(net, image), [image, *parameters])
    loss = both_ways(net, image)
    if replace == "data":
        for parameter in parameters:
            parameter.data = 2 * parameter.data
    else:
        net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()}, assign=True)
    own = list(net.parameters())
    assert all(map(torch.equal, torch.autograd.grad(loss, [image, *parameters]), expected))
    assert_same_tensors(net.parameters(), own)


def test_copies_without_parameters_are_refused():
    """Those of DataParallel on several GPUs: no gradient would reach their parameters."""
    block = ReversibleBlock(8)
    replica = block._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"reversible must be False within nn\.DataParallel"):
        run_chain([Coupling(replica)], list(torch.zeros(2, 1, 8, 5, 5)))


def test_a_shared_parameter_is_one():
    """Of several blocks, and of one that keeps it in two places: a hook sees the sum of their gradients once."""

    def of(reversible):
        torch.manual_seed(0)
        blocks = [ReversibleBlock(8, cafe=False) for _ in range(3)]
        for block in blocks:
            block.attention.weight = blocks[0].attention.weight
        blocks[1].features.again = blocks[1].attention.weight
        blocks[0].attention.weight.register_hook(lambda gradient: 3 * gradient)
        streams = [torch.rand(1, 8, 5, 5).div(STREAM_QUANTUM).round().mul(STREAM_QUANTUM) for _ in range(2)]
        found = run_chain([Coupling(block) for block in blocks], streams, reversible)
        names, parameters = zip(*torch.nn.ModuleList(blocks).named_parameters(), strict=True)
        sums = torch.autograd.grad(sum(stream.square().mean() for stream in found), parameters)
        return dict(zip(names, sums, strict=True))

    assert_close(of(True), of(False))


def test_frozen_parameters_and_inputs_without_gradient():
    image = picture(8, 12)
    expected = gradients(network(False), image)
    net = network()
    frozen = {name for name, _ in net.named_parameters() if "guide" in name or name.startswith("refinement")}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)
    both_ways(net, image).backward()
    for name, parameter in net.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name

    net.requires_grad_(False)
    assert not net.encode(image).requires_grad
    image.requires_grad_()
    both_ways(net, image).backward()
    assert torch.allclose(image.grad, expected["image"], rtol=1e-4, atol=1e-7)


def test_without_gradients_nothing_is_recorded():
    with torch.no_grad():
        assert network().encode(picture(8, 8)).grad_fn is None


def test_backward_recomputes_under_the_circumstances_of_forward():
    def cast(net, image):
        # Where all passes of plain autograd share the cast of a weight, its gradients are summed in bfloat16.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return both_ways(net, image)

    def on_reference(net, image):
        with use_backend("reference"):
            return both_ways(net, image)

    image = picture(9, 8)
    for compute in (cast, on_reference):
        assert_equal_gradients(network(), network(False), image, 1e-5, compute)


def test_backward_rebuilds_on_the_backend_of_forward():
    net, wishes = network(), []
    for module in net.modules():
        if isinstance(module, ReversibleBlock):
            module.features.register_forward_hook(lambda *_: wishes.append(_backend._ambient_wish()[0]))
    with use_backend("reference"):
        number = both_ways(net, picture(8, 8))
    evaluated = len(wishes)
    number.backward()
    assert wishes == ["reference"] * 2 * evaluated


def test_rounded_weights_are_those_of_now_and_nobody_elses():
    """Plain autograd rounds them in every block, this network once a pass, in a copy that it keeps to itself."""
    net, plain = (network(reversible, "bf16") for reversible in (True, False))
    image = picture(8, 12)
    for _ in range(2):
        assert torch.equal(net.encode(image), plain.encode(image))
        with net.unchanged_parameters():
            code = net.encode(image)
            assert torch.equal(net.decode(code), plain.decode(code))
        assert torch.equal(copy.deepcopy(net).encode(image), plain.encode(image))
        for parameter in (*net.parameters(), *plain.parameters()):
            parameter.data.mul_(1.25)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    convolutions = [module for module in net._rounded._copy.modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrisation_registered_after_a_pass_in_bf16_holds_in_the_next():
    plain, net = network(False, "bf16"), network(True, "bf16")
    image = picture(8, 12)
    before = net.encode(image)
    for each in (plain, net):
        for block in each.refinement:
            torch.nn.utils.parametrize.register_parametrization(block.attention, "weight", Doubled())
    assert not torch.equal(net.encode(image), before)
    assert torch.equal(net.encode(image), plain.encode(image))
    assert_equal_gradients(net, plain, image, 1e-5)


def test_transforms_of_torch_func_take_plain_autograd():
    image = picture(8, 12)
    found = torch.func.grad(functools.partial(both_ways, network(False)))(image)
    assert_close({"image": found}, {"image": gradients(network(), image)["image"]})
    for precision in PRECISIONS:
        with pytest.raises(RuntimeError, match=r"^ReversibleNetwork: .* within transforms"):
            torch.func.grad(functools.partial(both_ways, network(True, precision)))(image)


def test_channels_last_streams_are_rebuilt_as_well():
    image = picture(12, 16)
    expected = gradients(network(False), image)
    for name, gradient in gradients(network(), image.contiguous(memory_format=torch.channels_last)).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


def sum_of_code(net, image):
    """Its gradient to the code is a constant."""
    return net.encode(image).sum()


@pytest.mark.parametrize("function", [both_ways, sum_of_code])
def test_second_derivatives_are_refused(function):
    net = network()
    image = picture(8, 8).requires_grad_()
    (first,) = torch.autograd.grad(function(net, image), image, create_graph=True)
    message = "^ReversibleNetwork: reversible must be False where second derivatives are taken, got True$"
    with pytest.raises(RuntimeError, match=message):
        (function(net, image) + first.square().sum()).backward()
