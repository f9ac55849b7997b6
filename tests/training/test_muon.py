"""Muon: against singular values, torch's own, AdamW, and itself from a saved state."""

import pytest
import torch
from torch import nn

from lightning_modules.models import DualEncoder
from lightning_modules.models.config import resolve_config
from lightning_modules.training.optim.muon import Muon, orthogonalized
from lightning_modules.training.optim.optimizers import OptimizerConfig, build_optimizers

SHAPES = [(24, 24), (72, 24), (24, 64), (72, 24)]


def _matrices():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _vector():
    return nn.Parameter(torch.linspace(-1, 1, 9))


def _gradients(params, step):
    for place, param in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + place)
        param.grad = torch.randn(param.shape, generator=generator)


def _groups(matrices, vector, decay=0.1):
    return [{"params": matrices, "weight_decay": decay}], [{"params": [vector]}]


@pytest.mark.parametrize("shape", [(48, 48), (48, 96), (96, 48)])
def test_singular_values_come_near_one_and_their_vectors_stay(shape):
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix[0], full_matrices=False)
    turned = left.mT @ orthogonalized(matrix)[0] @ right.mT
    wanted = values / values.norm() > 0.01  # smaller ones need more rounds than five
    own = turned.diagonal()
    assert wanted.sum() > 40 and own[wanted].min() > 0.65 and own[wanted].max() < 1.25
    assert (turned - own.diag()).abs().max() < 1e-9


def test_a_matrix_without_a_gradient_signal_does_not_move():
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_it_is_torchs_muon_but_for_bfloat16():
    mine, theirs = _matrices(), _matrices()
    vector = _vector()
    optimizer = Muon(*_groups(mine, vector), lr=0.02)
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(6):
        before = [param.detach().clone() for param in mine]
        _gradients(mine, step)
        _gradients(theirs, step)
        optimizer.step()
        oracle.step()
    for one, other, last in zip(mine, theirs, before, strict=True):
        moved = (one - last).norm()
        assert (one - other).norm() < 0.1 * moved, "six steps apart by less than a tenth of one"


def test_the_rest_is_adamws_to_the_bit():
    mine, theirs = _vector(), _vector()
    optimizer = Muon(*_groups(_matrices(), mine), lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    optimizer.param_groups[-1]["weight_decay"] = 0.3
    oracle = torch.optim.AdamW(
        [theirs], lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, fused=True
    )
    for step in range(4):
        _gradients([mine], step)
        _gradients([theirs], step)
        optimizer.step()
        oracle.step()
        assert torch.equal(mine, theirs) and not torch.equal(mine, _vector())


@pytest.mark.parametrize("lot", [1, 72 * 24, 2**26])
def test_matrices_together_are_each_alone(monkeypatch, lot):
    monkeypatch.setattr("lightning_modules.training.optim.lots._LOT_ELEMENTS", lot)
    together, alone = _matrices(), _matrices()
    optimizers = [Muon(*_groups(together, _vector()))]
    optimizers += [Muon(*_groups([matrix], _vector())) for matrix in alone]
    for step in range(3):
        _gradients(together, step)
        _gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_a_matrix_without_a_gradient_stays():
    matrices = _matrices()
    _gradients(matrices, 0)
    matrices[1].grad = None
    Muon(*_groups(matrices, _vector()), lr=0.1).step()
    stayed = [torch.equal(one, other) for one, other in zip(matrices, _matrices(), strict=True)]
    assert stayed == [False, True, False, False]


def test_it_resumes_from_its_state_to_the_bit():
    def run(steps, restart_at=None):
        matrices, vector = _matrices(), _vector()
        optimizer = Muon(*_groups(matrices, vector), lr=0.02)
        for step in range(steps):
            if step == restart_at:
                state = optimizer.state_dict()
                optimizer = Muon(*_groups(matrices, vector, decay=0.7), lr=0.9)
                optimizer.load_state_dict(state)
            _gradients([*matrices, vector], step)
            optimizer.step()
        return [*matrices, vector]

    whole, resumed = run(5), run(5, restart_at=3)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def _tiny():
    return DualEncoder(resolve_config("eva02_at_tiny", num_frames=2))


def test_matrices_of_blocks_are_muons_and_all_else_is_adamws():
    model, scalar = _tiny(), nn.Parameter(torch.ones(1))
    config = OptimizerConfig(
        name="muon", lr=1.0, weight_decay=0.1, layer_decay=0.5, schedule="cosine", end_lr=0.5
    )
    built = build_optimizers(model, config, 10, 10, scalars=[scalar])
    optimizer = built["optimizer"]
    names = {id(p): name for name, p in model.named_parameters()} | {id(scalar): "scalar"}
    muon = [g for g in optimizer.param_groups if "betas" not in g]
    mine = {names[id(p)] for group in muon for p in group["params"]}
    kinds = ("attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.fc1.weight")
    assert len(mine) == 4 * 6 and all(name.endswith((*kinds, "mlp.fc2.weight")) for name in mine)
    every = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(names.values())
    assert {g["weight_decay"] for g in muon} == {0.1} and len({g["lr"] for g in muon}) > 1
    before = [group["lr"] for group in optimizer.param_groups]
    for _ in range(10):
        optimizer.step()
        built["lr_scheduler"]["scheduler"].step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([x / 2 for x in before])


def test_matrices_may_have_a_learning_rate_of_their_own():
    config = OptimizerConfig(name="muon", lr=0.1, matrix_lr=0.4, layer_decay=0.5)
    optimizer = build_optimizers(_tiny(), config, 1, 1)["optimizer"]
    rates = [{g["lr"] for g in optimizer.param_groups if ("betas" in g) == adam} for adam in (0, 1)]
    assert max(rates[0]) == pytest.approx(4 * sorted(rates[1])[-2]) and max(rates[1]) == 0.1
    for wrong in ({"name": "adamw", "matrix_lr": 0.1}, {"name": "muon", "matrix_lr": 0.0}):
        with pytest.raises(ValueError, match=r"optimizer\.matrix_lr is"):
            OptimizerConfig(**wrong)


def test_only_matrices_may_be_trained():
    model = _tiny().requires_grad_(False)
    model.visual.blocks[0].mlp.w12.weight.requires_grad_(True)
    optimizer = build_optimizers(model, OptimizerConfig(name="muon"), 1, 1)["optimizer"]
    model.visual.blocks[0].mlp.w12.weight.grad = torch.ones(512, 96)
    optimizer.step()


def test_slices_of_matrices_and_models_without_any_are_refused():
    with pytest.raises(ValueError, match=r"slices.*adamw or lamb"):
        build_optimizers(_tiny(), OptimizerConfig(name="muon"), 1, 1, sharded=True)
    with pytest.raises(ValueError, match="no matrix of the model's blocks"):
        build_optimizers(nn.Linear(3, 3), OptimizerConfig(name="muon"), 1, 1)
