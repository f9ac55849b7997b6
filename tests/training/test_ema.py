"""The average of the weights: its arithmetic, and evaluating with it."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_modules.training.optim.ema import WeightAverage


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([4.0, -2.0]))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


class Trainer:
    global_step = 0
    sanity_checking = False


def after(values, decay=0.5):
    module, trainer, average = Module(), Trainer(), WeightAverage(decay)
    average.on_train_start(trainer, module)
    for value in values:
        module.weight.data.fill_(value)
        trainer.global_step += 1
        average.on_train_batch_end(trainer, module, None, None, 0)
    return module, trainer, average


def test_the_average_by_hand():
    _, _, average = after([8.0, 0.0])
    # 4 -> (4 + 8) / 2 = 6 -> (6 + 0) / 2 = 3; -2 -> 3 -> 1.5; frozen weights are not averaged
    assert {n: t.tolist() for n, t in average._averages.items()} == {"weight": [3.0, 1.5]}


def test_a_batch_without_an_optimiser_step_does_not_count():
    module, trainer, average = after([8.0, 0.0])
    average.on_train_batch_end(trainer, module, None, None, 1)
    assert average._averages["weight"].tolist() == [3.0, 1.5]


def test_validation_sees_the_average_and_training_the_weights():
    module, trainer, average = after([8.0, 0.0])
    average.on_validation_start(trainer, module)
    assert module.weight.tolist() == [3.0, 1.5]
    average.on_validation_end(trainer, module)
    assert module.weight.tolist() == [0.0, 0.0]


def test_an_impossible_decay_is_refused():
    with pytest.raises(ValueError, match="must lie in"):
        WeightAverage(1.0)
