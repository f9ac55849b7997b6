"""Optimisers: groups, schedule values, LAMB against a hand-written step, step counts."""

import contextlib
import math

import pytest
import torch
from torch import nn

from lightning_modules.training.optim.lamb import Lamb
from lightning_modules.training.optim.optimizers import (
    OptimizerConfig,
    build_optimizers,
    optimizer_steps_per_epoch,
    parameter_groups,
    refuse_low_precision,
    total_optimizer_steps,
)
from lightning_modules.training.optim.schedules import LearningRateFactor


class Towers(nn.Module):
    """A model with the hooks that the groups ask for: three layers, one exempt matrix."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(1))

    def no_weight_decay(self):
        return {"pos_embed"}

    def layer_id(self, name):
        return {"pos_embed": 0, "block": 1}.get(name.split(".")[0], 2)


def _names(model, groups):
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        (g["weight_decay"], round(g["lr"], 6)): {names[id(p)] for p in g["params"]} for g in groups
    }


def test_biases_norms_positions_and_temperature_get_no_decay():
    model = Towers()
    groups = parameter_groups(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    assert _names(model, groups) == {
        (0.5, 0.1): {"block.weight", "head.weight"},
        (0.0, 0.1): {"pos_embed", "block.bias", "logit_scale"},
    }


@pytest.mark.parametrize("one_each", [False, True])
def test_what_a_loss_learns_has_the_full_rate_and_no_decay(one_each):
    model, config = Towers(), OptimizerConfig(lr=0.8, layer_decay=0.5, weight_decay=0.1)
    scalars = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    groups = parameter_groups(model, config, one_each=one_each, scalars=scalars)
    sizes = [sum(any(p is s for s in scalars) for p in group["params"]) for group in groups]
    held = [group for group, size in zip(groups, sizes, strict=True) if size]
    assert sum(sizes) == 2 and {(g["weight_decay"], g["lr"]) for g in held} == {(0.0, 0.8)}
    assert max(sizes) == (1 if one_each else 2)
    built = build_optimizers(model, config, 10, 10, scalars=scalars)["optimizer"]
    assert sum(p is s for g in built.param_groups for p in g["params"] for s in scalars) == 2
    without = parameter_groups(model, config, one_each=one_each)
    assert sum(len(g["params"]) for g in groups) == sum(len(g["params"]) for g in without) + 2


def test_layer_decay_scales_each_layer_down_from_the_top():
    model = Towers()
    groups = parameter_groups(model, OptimizerConfig(lr=0.8, layer_decay=0.5, weight_decay=0.1))
    assert _names(model, groups) == {
        (0.0, 0.2): {"pos_embed"},
        (0.1, 0.4): {"block.weight"},
        (0.0, 0.4): {"block.bias"},
        (0.1, 0.8): {"head.weight"},
        (0.0, 0.8): {"logit_scale"},
    }


def test_layer_decay_is_refused_for_a_model_that_does_not_count_layers():
    with pytest.raises(ValueError, match="layer_id"):
        parameter_groups(nn.Linear(2, 2), OptimizerConfig(layer_decay=0.9))


def test_frozen_parameters_are_left_out():
    model = Towers()
    model.block.requires_grad_(False)
    names = set().union(*_names(model, parameter_groups(model, OptimizerConfig())).values())
    assert names == {"pos_embed", "head.weight", "logit_scale"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        parameter_groups(model, OptimizerConfig())


def test_cosine_with_warm_up_goes_through_its_three_corners():
    factor = LearningRateFactor(
        schedule="cosine", total_steps=110, warmup_steps=10, start_factor=0.05, end_factor=0.1
    )
    assert factor(0) == pytest.approx(0.05)
    assert factor(5) == pytest.approx(0.525)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)


def test_constant_schedule_stays_at_the_peak():
    factor = LearningRateFactor(
        schedule="constant", total_steps=1, warmup_steps=2, start_factor=0.0, end_factor=0.0
    )
    assert [factor(s) for s in (0, 1, 2, 10**6)] == [0.0, 0.5, 1.0, 1.0]


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="shorten the warm-up"):
        LearningRateFactor(
            schedule="cosine", total_steps=10, warmup_steps=10, start_factor=0, end_factor=0
        )


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"lr": 0.0}, "above 0"),
        ({"layer_decay": 1.5}, "lie in"),
        ({"warmup_epochs": 1.0, "warmup_steps": 5}, "one of the two"),
    ],
)
def test_impossible_settings_are_refused(change, rule):
    with pytest.raises(ValueError, match=rule):
        OptimizerConfig(**change)


def test_scheduler_moves_every_group_by_its_own_rate():
    model = Towers()
    config = OptimizerConfig(
        lr=1.0, layer_decay=0.5, schedule="cosine", warmup_epochs=0.5, start_lr=0.1, end_lr=0.2
    )
    built = build_optimizers(model, config, total_steps=12, steps_per_epoch=4)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert built["lr_scheduler"]["interval"] == "step"
    first = sorted({group["lr"] for group in optimizer.param_groups})
    assert first == pytest.approx([0.025, 0.05, 0.1])
    for _ in range(2):  # half an epoch of four steps: the peak
        optimizer.step()
        scheduler.step()
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.25, 0.5, 1.0])


def _lamb_by_hand(weight, gradients, lr, betas, eps, decay):
    """Algorithm 2 of arXiv 1904.00962 on lists of floats."""
    mean, square = [0.0] * len(weight), [0.0] * len(weight)
    for step, gradient in enumerate(gradients, 1):
        mean = [betas[0] * m + (1 - betas[0]) * g for m, g in zip(mean, gradient, strict=True)]
        square = [
            betas[1] * v + (1 - betas[1]) * g * g for v, g in zip(square, gradient, strict=True)
        ]
        update = [
            (m / (1 - betas[0] ** step)) / (math.sqrt(v / (1 - betas[1] ** step)) + eps) + decay * w
            for m, v, w in zip(mean, square, weight, strict=True)
        ]
        trust = math.dist(weight, [0] * len(weight)) / math.dist(update, [0] * len(update))
        trust = trust if decay else 1.0
        weight = [w - lr * trust * u for w, u in zip(weight, update, strict=True)]
    return weight


@pytest.mark.parametrize("decay", [0.3, 0.0])
def test_lamb_equals_a_step_written_by_hand(decay):
    gradients = [[0.3, -0.2, 0.05], [-0.1, 0.4, 0.2], [0.6, 0.1, -0.3]]
    weight = nn.Parameter(torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64))
    optimizer = Lamb([weight], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    expected = _lamb_by_hand([0.5, -1.5, 2.0], gradients, 0.02, (0.8, 0.95), 1e-6, decay)
    # fp64 both ways: only the order of a few sums differs
    assert weight.tolist() == pytest.approx(expected, rel=1e-13)


def test_lamb_moves_a_parameter_that_is_still_zero():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    Lamb([weight], lr=0.1, weight_decay=0.1).step()
    # Adam's first step has size 1 by its bias correction; a ratio of 0 would never leave zero
    assert weight.tolist() == pytest.approx([-0.1] * 3, rel=1e-6)


@pytest.mark.parametrize("lot", [2**26, 12])
def test_lamb_of_many_parameters_is_lamb_of_each(monkeypatch, lot):
    """They go through each operation together, and come out as they would alone, to the bit."""
    monkeypatch.setattr("lightning_modules.training.optim.lots._LOT_ELEMENTS", lot)
    torch.manual_seed(0)
    start = [torch.randn(size) for size in (3, 7, 1, 20, 5)]

    def run(groups_of):
        params = [nn.Parameter(weight.clone()) for weight in start]
        decays = [0.1, 0.0, 0.1, 0.1, 0.0]
        optimizers = [Lamb(groups, lr=0.05) for groups in groups_of(params, decays)]
        for step in range(4):
            for number, param in enumerate(params):
                late = number == 2 and step == 0  # its step count lags behind
                param.grad = None if late else torch.cos(param.detach() + step + number)
            for optimizer in optimizers:
                optimizer.step()
        return params

    def together(params, decays):
        groups = [
            {
                "params": [p for p, d in zip(params, decays, strict=True) if d == w],
                "weight_decay": w,
            }
            for w in (0.1, 0.0)
        ]
        return [groups]

    def apart(params, decays):
        return [[{"params": [p], "weight_decay": d}] for p, d in zip(params, decays, strict=True)]

    for mine, alone in zip(run(together), run(apart), strict=True):
        assert torch.equal(mine, alone)


def test_lamb_resumes_from_its_state():
    def run(steps, restart_at=None):
        torch.manual_seed(3)
        weight = nn.Parameter(torch.randn(7))
        optimizer = Lamb([weight], lr=0.1, weight_decay=0.1)
        for step in range(steps):
            if step == restart_at:
                state = optimizer.state_dict()
                optimizer = Lamb([weight], lr=0.9)
                optimizer.load_state_dict(state)
            weight.grad = torch.sin(weight.detach() + step)
            optimizer.step()
        return weight

    assert torch.equal(run(5), run(5, restart_at=3))


class _Data:
    def __init__(self, steps):
        if steps is not None:
            self.batches_per_epoch = steps


class _Trainer:
    def __init__(self, steps=None, limit=1.0, accumulate=1, max_steps=-1, max_epochs=None):
        self.datamodule = _Data(steps)
        self.limit_train_batches = limit
        self.strategy = None
        self.accumulate_grad_batches = accumulate
        self.max_steps = max_steps
        self.max_epochs = max_epochs


def test_step_counts_follow_the_datamodule_limits_and_accumulation():
    assert optimizer_steps_per_epoch(_Trainer(steps=10)) == 10
    assert optimizer_steps_per_epoch(_Trainer(steps=10, accumulate=4)) == 3
    assert optimizer_steps_per_epoch(_Trainer(steps=10, limit=6)) == 6
    assert optimizer_steps_per_epoch(_Trainer(steps=10, limit=0.5)) == 5
    assert optimizer_steps_per_epoch(_Trainer(limit=7)) == 7
    with pytest.raises(ValueError, match="batches_per_epoch"):
        optimizer_steps_per_epoch(_Trainer())
    assert total_optimizer_steps(_Trainer(max_steps=9, max_epochs=5), 3) == 9
    assert total_optimizer_steps(_Trainer(max_epochs=5), 3) == 15


@pytest.mark.parametrize(("dtype", "refused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_weights_of_16_bits_are_not_stepped(dtype, refused):
    """What bf16-true makes of the module: 0.02 + 3e-5 is 0.02 there."""
    model = Towers().to(dtype)
    with (
        pytest.raises(ValueError, match=r"bfloat16 .* bf16-mixed, or a ZeRO strategy")
        if refused
        else contextlib.nullcontext()
    ):
        refuse_low_precision(model, 3e-5)
