"""One step of ZeRO on one CPU process; prints what was reduced before and after the backward pass.

python tests/cluster/zero_buckets.py FOLDER STAGE
"""

import json
import os
import sys
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.training.run.strategies import ZeroStrategy


class Tower(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(32)))

    def training_step(self, x, batch_idx):
        return self.model(x.to(self.model[0].weight.dtype)).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(Callback):
    def __init__(self) -> None:
        self.reduced = {"during": 0, "after": 0}

    def on_train_start(self, trainer, module) -> None:
        optimizer = trainer.strategy.deepspeed_engine.optimizer
        self.type = str(optimizer.communication_data_type)
        reduce, end = optimizer.reduce_ipg_grads, optimizer.independent_gradient_partition_epilogue
        place = ["during"]

        def watched_end(*args, **kwargs):
            place[0] = "after"
            return end(*args, **kwargs)

        def watched_reduce(*args, **kwargs):
            self.reduced[place[0]] += 1
            return reduce(*args, **kwargs)

        optimizer.reduce_ipg_grads = watched_reduce
        optimizer.independent_gradient_partition_epilogue = watched_end


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=ZeroStrategy(stage=int(sys.argv[2]), overlap_comm=True),
        precision="bf16-mixed",
        max_steps=1,
        logger=False,
        callbacks=[watch],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=sys.argv[1],
    )
    trainer.fit(Tower(), DataLoader(torch.randn(4, 64), batch_size=2))
    print(json.dumps({**watch.reduced, "type": watch.type}))
    sys.stdout.flush()
    os._exit(0)
