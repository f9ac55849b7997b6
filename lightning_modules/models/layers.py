"""The transformer block that both towers share, in EVA-02's and in CLIP's form.

Under autocast everything from the patches on has autocast's type, the residual stream too:
PyTorch's own rule would bring every norm's output to float32, which the linear map behind it casts
back, and keep the stream in float32. Sums within norms, attention and products are in float32 all
the same.

Shape legend: B clips, S tokens, D width, H heads, F hidden channels of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import st_rope_attention_packed, st_rope_attention_pooled
from kernels.gated_norm import gated_norm
from kernels.norm import add_layer_norm, layer_norm
from kernels.st_rope import StRopeTables

ALIGNMENT = 8  # channels: 16 bytes of 16-bit numbers, what fast loads and tensor cores ask of a row


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type to compute in: autocast's where it is on (never for float64), else that of `x`."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


@dataclass(frozen=True)
class BlockConfig:
    """One block's shape.

    Attributes:
        width: Channels D.
        num_heads: Attention heads.
        mlp_hidden: Hidden channels F.
        mlp: "swiglu", "gelu" or "quick_gelu".
        norm_eps: Epsilon of every LayerNorm.
        key_bias: Whether the key projection has a bias (EVA-02's has none).
        inner_norm: EVA-02's LayerNorm between the heads and the output projection.
        causal: Token i sees tokens 0..i only.
        attention_backend: Of `st_rope_attention`; the norms follow it.
    """

    width: int
    num_heads: int
    mlp_hidden: int
    mlp: str
    norm_eps: float
    key_bias: bool = True
    inner_norm: bool = False
    causal: bool = False
    attention_backend: str = "auto"


class Norm(nn.LayerNorm):
    """LayerNorm that leaves in its input's type, under autocast too; its sums are in float32."""

    def __init__(self, width: int, *, eps: float, backend: str = "auto") -> None:
        super().__init__(width, eps=eps)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., D) of the same dtype."""
        return layer_norm(input, self.weight, self.bias, self.eps, backend=self.backend)


class ResidualNorm(Norm):
    """The norm before a branch, with the addition of the branch before it."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + branch, for the residual stream to go on from, and its norm: (..., D) each."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, backend=self.backend)


class PackedProjection(nn.Module):
    """q, k and v as one linear map: (B, S, D) -> (B, S, 3D).

    EVA-02's checkpoints hold three matrices: one product of three times the width is the same
    arithmetic with a third of the launches, and leaves q and k side by side for the rotation. The
    parameters belong to this module, because ZeRO-3 and FSDP gather a module's own parameters.
    """

    def __init__(self, width: int, *, key_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.empty(width))
        self.k_bias = nn.Parameter(torch.empty(width)) if key_bias else None
        self.v_bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Initialise as three Linears."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Project all tokens to q, k, v; or one token a sample to q and all to k, v.

        Args:
            x: (B, S, D).
            index: (B,) int64, the token whose query is wanted, or None for all of them.

        Returns:
            None and q, k, v (B, S, 3D); or q (B, 1, D) and k, v (B, S, 2D).
        """
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        if index is None:
            bias = torch.cat((self.q_bias, k_bias, self.v_bias))
            return None, F.linear(x, self.weight, bias)
        width = x.shape[-1]
        q = F.linear(pick(x, index), self.weight[:width], self.q_bias)
        return q, F.linear(x, self.weight[width:], torch.cat((k_bias, self.v_bias)))


class Attention(nn.Module):
    """Self-attention, with ST-RoPE where tables are given."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.causal = config.causal
        self.backend = config.attention_backend
        self.qkv = PackedProjection(config.width, key_bias=config.key_bias)
        self.norm: nn.Module = nn.Identity()
        if config.inner_norm:
            self.norm = Norm(config.width, eps=config.norm_eps, backend=config.attention_backend)
        self.proj = nn.Linear(config.width, config.width)

    def forward(
        self, x: Tensor, tables: StRopeTables | None = None, index: Tensor | None = None
    ) -> Tensor:
        """(B, S, D) -> (B, S, D), or (B, 1, D) for token `index` of each sample alone."""
        q, projected = self.qkv(x, index)
        if q is None or index is None:
            out = st_rope_attention_packed(
                projected, self.num_heads, tables, backend=self.backend, causal=self.causal
            )
        else:
            q = q.unflatten(-1, (self.num_heads, -1))
            out = st_rope_attention_pooled(
                q, projected, index, tables, backend=self.backend, causal=self.causal
            )
        return self.proj(self.norm(out.flatten(2)))


class PaddedBranches(nn.Linear):
    """SwiGLU's two branches in one product: (B, S, D) -> (B, S, 2P), each F channels and zeros.

    The L model has F = 2,730: rows of 5,460 bytes in bf16, which do not begin at multiples of 16
    bytes, so that matrix kernels of GPUs fall back to slow forms. P = 2,736 is the next that does.
    The parameters keep F, and so do checkpoints: padding them is a pass over the weights, some
    thousandth of the product.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Product and padding."""
        padding = -(self.out_features // 2) % ALIGNMENT
        if not padding:
            return super().forward(input)
        weight, bias = (
            F.pad(p.to(input.dtype).unflatten(0, (2, -1)), (0, 0) * (p.dim() - 1) + (0, padding))
            for p in (self.weight, self.bias)
        )
        return F.linear(input, weight.flatten(0, 1), bias.flatten())


class PaddedInput(nn.Linear):
    """The linear map behind `PaddedBranches`: (B, S, P) -> (B, S, D)."""

    def forward(self, input: Tensor) -> Tensor:
        """The padding's channels meet zeros."""
        padding = input.shape[-1] - self.in_features
        if not padding:
            return super().forward(input)
        return F.linear(input, F.pad(self.weight.to(input.dtype), (0, padding)), self.bias)


class GatedNorm(nn.LayerNorm):
    """SwiGLU's gate and inner norm: (B, S, 2P) -> LN(SiLU(gate) * value), (B, S, P)."""

    def __init__(self, channels: int, *, eps: float, backend: str) -> None:
        super().__init__(channels, eps=eps)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Gate and value side by side in; half the channels out."""
        return gated_norm(input, self.weight, self.bias, self.eps, backend=self.backend)


class SwiGlu(nn.Module):
    """EVA-02's MLP: fc2(LN(SiLU(w1 x) * (w2 x))), with w1 and w2 packed in one matrix."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.w12 = PaddedBranches(config.width, 2 * config.mlp_hidden)
        self.norm = GatedNorm(
            config.mlp_hidden, eps=config.norm_eps, backend=config.attention_backend
        )
        self.fc2 = PaddedInput(config.mlp_hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.fc2(self.norm(self.w12(x)))


class Mlp(nn.Module):
    """CLIP's MLP: two linear maps around GELU, in its exact (erf) or its sigmoid form."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.width)
        self.quick = config.mlp == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        hidden = self.fc1(x)
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        return self.fc2(hidden)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch of whole samples, rescaling those kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1.0 - self.rate)


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm1 x); x += mlp(norm2 x)."""

    def __init__(self, config: BlockConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        norm = partial(
            ResidualNorm, config.width, eps=config.norm_eps, backend=config.attention_backend
        )
        self.norm1 = norm()
        self.attn = Attention(config)
        self.norm2 = norm()
        self.mlp = SwiGlu(config) if config.mlp == "swiglu" else Mlp(config)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, tables: StRopeTables | None = None, index: Tensor | None = None
    ) -> Tensor:
        """(B, S, D) -> (B, S, D), or (B, 1, D) for token `index` of each sample alone."""
        x, normed = self.norm1(x)
        attended = self.drop_path(self.attn(normed, tables, index))
        x, normed = self.norm2(x if index is None else pick(x, index), attended)
        return x + self.drop_path(self.mlp(normed))


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Token `index` (B,) of each sample: (B, S, D) -> (B, 1, D)."""
    return x[torch.arange(x.shape[0], device=x.device), index].unsqueeze(1)


class BlockStack(nn.ModuleList):
    """A tower's blocks up to its pooled token, each recomputed in the backward pass if asked.

    Non-reentrant checkpointing: it works where the input needs no gradient (a frozen patch
    embedding), and under DDP and torch.compile.
    """

    def __init__(
        self,
        config: BlockConfig,
        depth: int,
        *,
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        super().__init__(Block(config, rate) for rate in rates)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, tables: StRopeTables | None, index: Tensor) -> Tensor:
        """Run the blocks and pool.

        The last block computes only what is asked of it: keys and values of every token, but
        query, output and MLP of the pooled token alone. The result is the same; 5/6 of the last
        block's arithmetic is not done.

        Args:
            x: (B, S, D).
            tables: Rotation of q and k, or None.
            index: (B,) int64, the token to pool; with tables it must be the CLS, 0.

        Returns:
            (B, D), the pooled token after the last block.
        """
        return self.pool(self.all_but_last(x, tables), tables, index)

    def all_but_last(self, x: Tensor, tables: StRopeTables | None) -> Tensor:
        """(B, S, D): every token as the last block meets it, the last that training shapes."""
        for block in list(self)[:-1]:
            x = self._run(block, x, tables, None)
        return x

    def pool(self, x: Tensor, tables: StRopeTables | None, index: Tensor) -> Tensor:
        """(B, D): the last block on what `all_but_last` gives."""
        return self._run(self[-1], x, tables, index)[:, 0]

    def _run(self, block: nn.Module, *arguments: Tensor | StRopeTables | None) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


def init_layers(root: nn.Module) -> None:
    """Initialise every Linear and LayerNorm under `root`: std 0.02, zero biases, unit norms."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, PackedProjection)):
            module.reset_parameters()
