"""torch.func and forward mode: every operator takes its reference there; a kernel asked for by name says why not."""

import compare
import pytest
import torch
from torch.autograd import forward_ad

from restoration_kernels._samples import DIFFERENTIABLE, samples

every_operator = pytest.mark.parametrize("operator", DIFFERENTIABLE)


def sum_by_first(operator):
    """The sum of an operator's outputs as a function of its first tensor with gradients, and that tensor."""
    (sample, *_) = samples(operator, "tiny")
    arguments = sample.arguments(torch.float64)
    name = DIFFERENTIABLE[operator][0]

    def function(value, backend=None):
        result = compare.public(operator, backend)(**{**arguments, name: value})
        return sum(output.sum() for output in compare.as_tuple(result))

    return function, arguments[name]


@every_operator
def test_gradients_and_tangents_are_those_of_autograd(operator):
    function, value = sum_by_first(operator)
    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    tangent = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
    assert torch.allclose(torch.func.grad(function)(value), gradient)
    along = (gradient * tangent).sum()
    assert torch.allclose(torch.func.jvp(function, (value,), (tangent,))[1], along)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(value, tangent))).tangent
    assert torch.allclose(found, along)


def test_what_is_added_to_the_gradient_is_not_added_to_the_tangent():
    (sample, *_) = samples("dual_pool_attention_pad2d", "tiny")
    arguments = sample.arguments(torch.float64)
    x = arguments.pop("x")

    def tangent(**options):
        function = compare.public("dual_pool_attention_pad2d", None)
        return torch.func.jvp(lambda value: function(value, **arguments, **options), (x,), (torch.ones_like(x),))[1]

    assert torch.equal(tangent(grad_addend=torch.ones_like(x)), tangent())


@every_operator
def test_vmap_keeps_the_graph_of_what_it_maps_over(operator):
    function, value = sum_by_first(operator)
    leaf = torch.stack([value, 0.5 * value]).requires_grad_()
    mapped = torch.func.vmap(function)(leaf)
    assert torch.allclose(mapped, torch.stack([function(part) for part in leaf]))
    (found,) = torch.autograd.grad(mapped.sum(), leaf)
    (expected,) = torch.autograd.grad(sum(function(part) for part in leaf), leaf)
    assert torch.allclose(found, expected)


@every_operator
def test_compiled_tangents_are_those_of_eager_mode(operator):
    function, value = sum_by_first(operator)
    tangent = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)

    def along(value):
        return torch.func.jvp(function, (value,), (tangent,))[1]

    torch.compiler.reset()
    assert torch.allclose(torch.compile(along, fullgraph=True, backend="aot_eager")(value), along(value))


def test_compiled_gradients_are_those_of_eager_mode():
    function, value = sum_by_first("dual_pool_attention")
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(function), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(value), torch.func.grad(function)(value))


def test_a_graph_compiled_before_refuses_tangents():
    """What torch.compile has made of a call without tangents would leave them out."""
    function, value = sum_by_first("dual_pool_attention")
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager")
    compiled(value)
    with forward_ad.dual_level():
        compiled(value)
        with pytest.raises(RuntimeError, match=r"^dual_pool_attention: backend must be 'reference' where tensors have"):
            compiled(forward_ad.make_dual(value, value))


@every_operator
def test_a_kernel_asked_for_by_name_refuses(operator):
    function, value = sum_by_first(operator)
    with pytest.raises(
        RuntimeError, match=rf"^{operator}: .* \'cpu\' .*: its kernel knows no transforms of torch.func$"
    ):
        torch.func.grad(lambda one: function(one, "cpu"))(value)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"its kernel knows no forward-mode differentiation$"),
    ):
        function(forward_ad.make_dual(value, value), "cpu")
