"""Backward passes that cannot be differentiated themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def differentiable_once(refusal: str) -> Callable:
    """Decorator of an autograd function's backward: RuntimeError with this message where its results go backward.

    torch.autograd.function.once_differentiable says so only where the gradients that backward is given have a graph.
    Where they are constants, as that of a sum, it returns results without one, and second derivatives are left out in
    silence.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def refusing(ctx, *gradients):
            with torch.no_grad():
                found = backward(ctx, *gradients)
            if not torch.is_grad_enabled():
                return found
            several = found if isinstance(found, tuple) else (found,)
            refuse = torch._C._functions.DelayedError(refusal, len(several))
            return refuse(*(None if each is None else each.detach().requires_grad_() for each in several))

        return refusing

    return decorate
