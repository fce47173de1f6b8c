"""Optimizers of others that papers compare with and that need a few lines to be one of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.objects import UserError


class Muon(Optimizer):
    """Muon for the matrices, AdamW for all else, at one learning rate.

    Muon's steps are scaled to 0.2 of the rate (``match_rms_adamw``), as AdamW's are in practice.

    Args:
        params: The parameters.
        lr: The learning rate.
        momentum: Muon's.
        betas: AdamW's.
        weight_decay: Of both; none by default, as the loss of an experiment is what it says.

    Source: ``torch.optim.Muon``, and Liu et al., arXiv 2502.16982, for the scale.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 5e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        parameters = list(params)
        if not all(isinstance(p, Tensor) for p in parameters):
            raise UserError(
                "muon must have the parameters themselves, which it groups by their shapes, got "
                f"{', '.join(sorted({type(p).__name__ for p in parameters}))}. Pass "
                "model.parameters()."
            )
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **shared
                )
            )
        if others:
            self._parts.append(torch.optim.AdamW(others, betas=betas, **shared))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both, after the closure."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # loading a state replaces them
            part.step()
        return loss


def soap(
    params: Iterable[Tensor],
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    weight_decay: float = 0.0,
    precondition_frequency: int = 10,
) -> Optimizer:
    """SOAP, which is Adam in the eigenbases of Shampoo, from the package pytorch_optimizer.

    Args:
        params: The parameters.
        lr: The learning rate.
        betas: Decays of the two moments.
        weight_decay: None by default, as the loss of an experiment is what it says.
        precondition_frequency: Steps between two updates of the bases.

    Source: Vyas et al., arXiv 2409.11321.
    """
    try:
        from pytorch_optimizer import SOAP  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError(
            f"soap must have the package pytorch_optimizer, got: {error}. Install it: pip install "
            "pinncurv[baselines]."
        ) from error
    return SOAP(
        params,
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
    )
