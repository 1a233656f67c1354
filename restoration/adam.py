"""Adam, by PyTorch's fused kernels.

Not torch.optim.Adam around them: the first optimiser of a process imports PyTorch's compiler, 145 MB and a second, of
which a training step uses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class Adam:
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, with torch.optim.Adam's betas and epsilon.

    Args:
        parameters: real, on one device.
        learning_rate: a number on that device; may be changed in place between steps.

    Attributes:
        state: what is kept of a parameter from its first gradient on, by its place among them: `step`, how many were
            made, and the moments `exp_avg` and `exp_avg_sq`, of its shape.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: Tensor) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.state: dict[int, dict[str, Tensor]] = {}

    def load(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Takes over such a state, on the parameters' device."""
        self.state = {
            index: {key: value.to(self.parameters[index].device) for key, value in kept.items()}
            for index, kept in state.items()
        }

    @torch.no_grad()
    def step(self, divisor: Tensor, skipped: Tensor) -> None:
        """Moves parameters by their gradients over divisor, which are divided, too; changes nothing where skipped is 1.

        Both are numbers on the device, which alone looks at them.
        """
        moved = {index: parameter for index, parameter in enumerate(self.parameters) if parameter.grad is not None}
        for index in moved.keys() - self.state.keys():
            self.state[index] = _nothing_done(moved[index])
        kept = [self.state[index] for index in moved]
        adam(
            list(moved.values()),
            [parameter.grad for parameter in moved.values()],
            [state["exp_avg"] for state in kept],
            [state["exp_avg_sq"] for state in kept],
            [],
            [state["step"] for state in kept],
            fused=True,
            grad_scale=divisor,
            found_inf=skipped,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def _nothing_done(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
