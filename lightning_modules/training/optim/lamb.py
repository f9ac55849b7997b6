"""LAMB (You et al., arXiv 1904.00962), plain torch, exact under DeepSpeed's flat partitions too.

DeepSpeed's FusedLamb is CUDA-only and takes its norms over whatever flat buffer ZeRO hands it,
which is a different algorithm; this one adds up the squares over the ranks that share a parameter.
Parameters that are alike go through each operation together, in one launch instead of hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.collectives import on_group_device
from lightning_modules.training.optim.lots import loss_of, lots_of


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
        loss = loss_of(closure)
        steps = [
            (group, params, self._directions(group, params))
            for group, params in lots_of(self.param_groups, self._likeness)
        ]
        adapted = [(params, updates) for group, params, updates in steps if group["weight_decay"]]
        ratios = self._trust_ratios(adapted)
        for group, params, updates in steps:
            if group["weight_decay"]:
                own, ratios = ratios[: len(params)], ratios[len(params) :]
                torch._foreach_mul_(updates, (own * group["lr"]).unbind())
            else:
                torch._foreach_mul_(updates, group["lr"])
            torch._foreach_sub_(params, updates)
        return loss

    def _likeness(self, group: dict[str, Any], param: Tensor) -> tuple[Any, ...]:
        """Settings, step, device and type."""
        settings = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
        return (*settings, float(self._state_of(param)["step"]), param.device, param.dtype)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state

    def _directions(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Bias-corrected Adam direction plus decay: r_t + lambda * x_t of the paper."""
        states = [self.state[param] for param in params]
        grads = [param.grad for param in params if param.grad is not None]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        step = float(states[0]["step"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_div(squares, 1 - beta2**step)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, 1 - beta1**step)
        torch._foreach_div_(updates, roots)
        del roots
        if group["weight_decay"]:
            torch._foreach_add_(updates, torch._foreach_mul(params, group["weight_decay"]))
        return list(updates)

    def _trust_ratios(self, lots: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
        """|x| / |update| of each parameter, 1 where either is zero: one vector."""
        if not lots:
            return torch.ones(0)
        norms = torch.cat(
            [
                torch.stack([torch.stack(torch._foreach_norm(side)) for side in lot], dim=1)
                for lot in lots
            ]
        )
        if self._sharded and dist.is_initialized():
            summed = on_group_device(norms.square())
            dist.all_reduce(summed)
            norms = summed.sqrt().to(norms.device)
        weight, update = norms.unbind(1)
        usable = (weight > 0) & (update > 0)
        return torch.where(usable, weight / update, torch.ones_like(weight))
