"""The re-ranker: looks at a clip's patches and a sentence's words together.

A dual encoder compares one vector of a clip with one of a sentence, which is what makes it fast:
what it has not put into the vector is lost. The image-text-matching head of ALBEF (arXiv
2107.07651) and BLIP reads both sides' tokens instead, a pair at a time: words attend to words, then
to the patches, and a query token that reads along says how well the pair fits.

    l_ij = w . LN(h(q, words_j, patches_i)[q]) + b,      p_ij = sigmoid(l_ij)

Differences from ALBEF: the towers stay as they are and give the tokens, so that the candidates in
training are those of the test and the dual encoder's own figures cannot move; p_ij is trained
towards the relevance c_ij (`losses.matching`), not towards 0 or 1; patches are averaged over
windows, so that a test set's fit into memory.

Shape legend: C clips, P pairs, T frames, N patches a frame, M = T * N / window^2 places of a clip,
L words, D channels of a tower, W of the head.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.config import DualEncoderConfig, VisionConfig
from lightning_modules.models.dual_encoder import DualEncoder
from lightning_modules.models.layers import Norm, compute_dtype, init_layers

_EPS = 1e-5


@dataclass
class RerankConfig:
    """The head of a re-ranker.

    Attributes:
        width: Channels W.
        depth: Blocks.
        num_heads: Attention heads.
        window: Side of the square of patches that are averaged to one place; divides the grid.
        dropout: Of each block's three branches, in training.
    """

    width: int = 512
    depth: int = 4
    num_heads: int = 8
    window: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1 or self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                f"a re-ranker of width {self.width}, depth {self.depth} and {self.num_heads} heads "
                "given; all are at least 1, and the heads divide the width"
            )
        if self.window < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"window {self.window} and dropout {self.dropout} of a re-ranker given; at least "
                "1, and in [0, 1)"
            )


class _MatchBlock(nn.Module):
    """Pre-norm: words attend to words, then to the clip's places, then an MLP."""

    def __init__(self, config: RerankConfig) -> None:
        super().__init__()
        width, self.num_heads = config.width, config.num_heads
        self.norm1, self.norm2, self.norm3 = (Norm(width, eps=_EPS) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj1, self.proj2 = nn.Linear(width, width), nn.Linear(width, width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, words: Tensor, places: Tensor, clips: Tensor) -> Tensor:
        """(P, L, W) -> (P, L, W); see `ReRanker.forward`."""
        q, k, v = (self._heads(part) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=words[:, None, None])
        x = x + self.drop(self.proj1(self._merge(seen)))
        # keys and values once a clip, not once a pair
        k, v = (self._heads(part) for part in self.kv(places).chunk(2, dim=-1))
        k, v = (
            part.expand(len(x), -1, -1, -1) if len(places) == 1 else part[clips] for part in (k, v)
        )
        seen = F.scaled_dot_product_attention(self._heads(self.q(self.norm2(x))), k, v)
        x = x + self.drop(self.proj2(self._merge(seen)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm3(x)))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Places(nn.Module):
    """What is kept of clips: patches averaged over windows, in the head's width.

    Raises:
        ValueError: The window does not divide the grid of patches.
    """

    def __init__(self, config: RerankConfig, vision: VisionConfig) -> None:
        super().__init__()
        rows, self.window = vision.grid[0], config.window
        if rows % config.window:
            raise ValueError(
                f"window {config.window} of the re-ranker does not divide the {rows} x {rows} "
                "patches of a frame"
            )
        self.num_frames = vision.num_frames
        self.norm = Norm(vision.width, eps=_EPS)
        self.proj = nn.Linear(vision.width, config.width)
        self.frame_embed = nn.Parameter(torch.empty(vision.num_frames, 1, config.width))
        self.window_embed = nn.Parameter(torch.empty((rows // config.window) ** 2, config.width))

    def forward(self, patches: Tensor) -> Tensor:
        """Reduce patches.

        Args:
            patches: (C, T, N, D), of `VideoEncoder.with_patches`.

        Returns:
            (C, M, W).

        Raises:
            ValueError: Another number of frames than the head knows.
        """
        if patches.shape[1] != self.num_frames:
            raise ValueError(
                f"clips of {patches.shape[1]} frames given; the re-ranker was trained on "
                f"{self.num_frames}"
            )
        window, x = self.window, patches.to(compute_dtype(self.proj.weight))
        if window > 1:
            side = round(x.shape[2] ** 0.5)
            x = x.unflatten(2, (side // window, window, side // window, window))
            x = x.mean(dim=(3, 5)).flatten(2, 3)
        x = self.proj(self.norm(x))
        return (x + self.frame_embed + self.window_embed).flatten(1, 2)


class ReRanker(nn.Module):
    """The head alone; the tokens are a dual encoder's, which it keeps the fingerprint of.

    Args:
        config: Its size.
        dual: Of the dual encoder whose tokens it reads.

    Raises:
        ValueError: The window does not divide the grid of patches.
    """

    def __init__(self, config: RerankConfig, dual: DualEncoderConfig) -> None:
        super().__init__()
        self.config, self.dual = config, dual
        self.places = Places(config, dual.vision)
        self.word_norm = Norm(dual.text.width, eps=_EPS)
        self.word_proj = nn.Linear(dual.text.width, config.width)
        self.query = nn.Parameter(torch.empty(1, 1, config.width))
        self.blocks = nn.ModuleList(_MatchBlock(config) for _ in range(config.depth))
        self.norm = Norm(config.width, eps=_EPS)
        self.head = nn.Linear(config.width, 1)
        self.fingerprint: Tensor  # of the dual encoder it was trained on
        self.register_buffer("fingerprint", torch.zeros(32, dtype=torch.uint8))
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter.

        Linear maps by their inputs and positions with 1, not with the towers' 0.02: projected
        places are of unit size, and beside them faint positions leave frames without an order,
        faint maps attend to everything alike (docs/rerank.md).
        """
        init_layers(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.normal_(self.query, std=0.5)
        for parameter in (self.places.frame_embed, self.places.window_embed):
            nn.init.normal_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Names of the positions; what has one axis decays nowhere."""
        return {"places.frame_embed", "places.window_embed", "query"}

    def words(self, tokens: Tensor) -> Tensor:
        """(P, L, D), of `TextEncoder.with_words`, to (P, L, W)."""
        return self.word_proj(self.word_norm(tokens.to(compute_dtype(self.word_proj.weight))))

    def forward(self, places: Tensor, words: Tensor, mask: Tensor, clips: Tensor) -> Tensor:
        """Look at pairs.

        Args:
            places: (C, M, W).
            words: (P, L, W).
            mask: (P, L) bool, False behind the end of a sentence.
            clips: (P,) int64, the clip of each pair; of no matter where C is 1.

        Returns:
            (P,) logits, float32 at least.
        """
        x = torch.cat((self.query.to(words.dtype).expand(len(words), -1, -1), words), dim=1)
        mask = F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, mask, places, clips)
        logits = self.head(self.norm(x[:, 0])).squeeze(-1)
        return logits if logits.element_size() >= 4 else logits.float()


def words_of(tokens: Tensor) -> Tensor:
    """(B, L) token ids to (B, L) bool: False behind the end-of-text token, the highest id."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return place <= tokens.argmax(dim=-1, keepdim=True)


def fingerprint(model: DualEncoder) -> Tensor:
    """(32,) uint8 SHA-256 of a dual encoder's weights, in float32 on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
