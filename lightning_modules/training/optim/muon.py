"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) beside AdamW, as one optimiser.

torch.optim.Muon works in bfloat16 alone, matrix by matrix: a CPU without bfloat16 products takes
as long for that as for the demo's whole step. Here alike matrices go through it together, on a CPU
in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_modules.training.optim.lots import loss_of, lots_of

_MOMENTUM = 0.95
_ROUNDS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: the steepest at zero that stays near 1
_SMALLEST_NORM = 1e-7
_RMS = 0.2  # of an AdamW step, in learning rates (Liu et al.)


class Muon(Optimizer):
    """A matrix's step is its momentum with all singular values brought near 1; AdamW for the rest.

    Steps of matrices are scaled to the size of AdamW's, by 0.2 sqrt(max(rows, columns)), so that
    both take the same learning rate and weight decay (Liu et al., arXiv 2502.16982, eq. 4).

    Args:
        matrices: Groups of parameters with two axes.
        others: Groups for AdamW.
        lr: Learning rate.
        betas: AdamW's decay of the moments.
        eps: AdamW's addition to the root of the second moment.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._adamw = AdamW(others or [{"params": []}], lr=lr, betas=betas, eps=eps, fused=True)
        self._num_groups = len(matrices)
        super().__init__([*matrices, *self._adamw.param_groups], {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        loss = loss_of(closure)
        for group, lot in lots_of(self.param_groups[: self._num_groups], _likeness):
            self._step_matrices(lot, group["lr"], group["weight_decay"])
        # a loaded state brings groups of its own
        self._adamw.state, self._adamw.param_groups = (
            self.state,
            self.param_groups[self._num_groups :],
        )
        self._adamw.step()
        return loss

    def _step_matrices(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        """Step matrices of one shape."""
        grads = [param.grad for param in params if param.grad is not None]
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        momenta = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(momenta, grads, 1 - _MOMENTUM)
        ahead = torch._foreach_lerp(grads, momenta, _MOMENTUM)  # Nesterov's
        steps = orthogonalized(torch.stack(list(ahead)))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        scale = _RMS * math.sqrt(max(params[0].shape))
        torch._foreach_add_(params, list(steps.to(params[0].dtype).unbind()), alpha=-lr * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring all singular values near 1, by five Newton-Schulz rounds of Jordan's quintic.

    Args:
        matrices: (N, R, C).

    Returns:
        (N, R, C) about U V^T of each, singular values mostly within 0.7 and 1.2; bfloat16 on GPUs.
    """
    a, b, c = _QUINTIC
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _likeness(group: dict[str, Any], param: Tensor) -> tuple[Any, ...]:
    return group["lr"], group["weight_decay"], param.shape, param.device, param.dtype
