"""What models of towers share: which parameters decay, at what rate they learn, compilation."""

from __future__ import annotations

import re

import torch
from torch import nn

from lightning_modules.models.config import DualEncoderConfig
from lightning_modules.models.text import TextEncoder
from lightning_modules.models.vision import VideoEncoder


class Towers(nn.Module):
    """A model of a video tower `visual` and, perhaps, a text tower `text`."""

    config: DualEncoderConfig

    @property
    def towers(self) -> dict[str, VideoEncoder | TextEncoder]:
        """The towers by name."""
        return {
            name: child
            for name, child in self.named_children()
            if isinstance(child, VideoEncoder | TextEncoder)
        }

    def compile_blocks(self) -> None:
        """Compile every block in place: names and checkpoints stay as they are.

        All blocks of a tower share one graph, and the last has another. With stochastic depth
        each block's rate makes a graph of its own, more than PyTorch's default limit of 8.
        """
        blocks = [block for tower in self.towers.values() for block in tower.blocks]
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, len(blocks) + 8)
        for block in blocks:
            block.compile()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that no recipe decays: biases, norms, positions, temperature."""
        positions = ("cls_token", "pos_embed", "temporal_embed", "positional_embedding")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() < 2 or name.rsplit(".", 1)[-1] in positions
        }

    @property
    def num_layers(self) -> int:
        """Blocks of the deepest tower: `layer_id` runs from 0 to num_layers + 1."""
        return max(len(tower.blocks) for tower in self.towers.values())

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter for layer-wise learning-rate decay.

        Args:
            name: As in `named_parameters()`.

        Returns:
            num_layers + 1 for the final norms, projections and temperature; i for the i-th block
            from the input, counted so that all towers end at num_layers; one below a tower's
            first block for its embeddings. The rate of layer i is decay^(num_layers + 1 - i).

        Raises:
            ValueError: if the name is no parameter of this model.
        """
        match = re.fullmatch(r"(visual|text)\.(\w+)(?:\.(\d+))?.*", name)
        if name == "logit_scale" or (match and match[2] in ("norm", "head")):
            return self.num_layers + 1
        if match is None or match[1] not in self.towers:
            raise ValueError(f"{name!r} is no parameter of this model")
        first = self.num_layers - len(self.towers[match[1]].blocks)
        return first + 1 + int(match[3]) if match[2] == "blocks" else first
