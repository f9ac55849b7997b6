"""Two ranks train a small dual encoder one step under each ZeRO stage and save it.

usage: zero_ranks.py FOLDER CONFIG.json. Beside each checkpoint, `STAGE-PRECISION.pt` holds the
whole fp32 weights as DeepSpeed itself gathers them from the live engine.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from lightning_modules.checkpoints.model_config import read_config
from lightning_modules.models import DualEncoder

CASES = [
    (0, "fp32"),
    (0, "bf16"),
    (1, "fp32"),
    (1, "bf16"),
    (2, "fp32"),
    (2, "bf16"),
    (3, "fp32"),
    (3, "bf16"),
]


class Module(nn.Module):
    """The dual encoder under the name that our LightningModules give it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, video, tokens):
        return self.model(video, tokens)


def save(folder: Path, config: Path, stage: int, precision: str) -> None:
    torch.manual_seed(0)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
    }
    module = Module(DualEncoder(read_config(config)))
    decay, plain = [], []  # two groups: each has its own flat buffer and padding
    for parameter in module.parameters():
        (decay if parameter.dim() > 1 else plain).append(parameter)
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": plain}], lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    generator = torch.Generator().manual_seed(dist.get_rank())
    video = torch.randn(1, 3, 4, 16, 16, generator=generator)
    tokens = torch.randint(1, 99, (1, 77), generator=generator)
    a, b, scale = engine(video, tokens)
    engine.backward((scale * (a * b).sum()).float())
    engine.step()
    weights = {
        name: (p if stage == 0 else safe_get_full_fp32_param(p)).detach().float().clone()
        for name, p in module.model.named_parameters()
    }
    name = f"{stage}-{precision}"
    engine.save_checkpoint(str(folder / name), tag="checkpoint", client_state={"epoch": 1})
    if dist.get_rank() == 0:
        torch.save(weights, folder / f"{name}.pt")


def run_rank(rank: int, folder: Path, config: Path) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    # a file to meet at: no port that another test may hold
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo")
    for stage, precision in CASES:
        save(folder, config, stage, precision)
    dist.destroy_process_group()
    return 0


def main(folder: Path, config: Path) -> int:
    children = []
    for rank in range(2):  # forked: the imports above take seconds
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = run_rank(rank, folder, config)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
