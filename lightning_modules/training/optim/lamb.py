"""LAMB (You et al., arXiv 1904.00962), plain torch, exact under DeepSpeed's flat partitions too.

DeepSpeed's FusedLamb is CUDA-only and takes its norms over whatever flat buffer ZeRO hands it,
which is a different algorithm; this one adds up the squares over the ranks that share a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Adam whose step of each parameter is scaled by |parameter| / |step| (Algorithm 2).

    Parameters without weight decay (biases, norms) take the plain Adam step, as the common
    implementations do: their norms say nothing about a sensible step.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, part of the step that the trust ratio scales.
        sharded: Set when ZeRO hands each rank a slice of every parameter, with one parameter a
            group: the norms are then summed over all ranks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        sharded: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._sharded = sharded

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [
            (group, param, self._direction(group, param))
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        adapted = [(param, update) for group, param, update in todo if group["weight_decay"]]
        ratios = iter(self._trust_ratios(adapted))
        for group, param, update in todo:
            scale = next(ratios) if group["weight_decay"] else 1.0
            param.sub_(update * (group["lr"] * scale))
        return loss

    def _direction(self, group: dict[str, Any], param: Tensor) -> Tensor:
        """Bias-corrected Adam direction plus decay: r_t + lambda * x_t of the paper."""
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = float(state["step"])
        state["exp_avg"].lerp_(param.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        mean = state["exp_avg"] / (1 - beta1**step)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_()
        return mean / root.add_(group["eps"]) + group["weight_decay"] * param

    def _trust_ratios(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """|x| / |update| of each pair, 1 where either is zero."""
        if not pairs:
            return []
        squares = torch.stack([torch.stack([p.square().sum(), u.square().sum()]) for p, u in pairs])
        if self._sharded and dist.is_initialized():
            dist.all_reduce(squares)
        weight, update = squares.sqrt().unbind(1)
        usable = (weight > 0) & (update > 0)
        return list(torch.where(usable, weight / update, torch.ones_like(weight)).unbind())
