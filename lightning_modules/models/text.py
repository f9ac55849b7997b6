"""The text tower: CLIP's causal transformer.

Shape legend: B sentences, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.models.config import TextConfig
from lightning_modules.models.layers import (
    BlockConfig,
    BlockStack,
    Norm,
    compute_dtype,
    init_layers,
)


class TextEncoder(nn.Module):
    """Token ids to embeddings (not normalised), pooled at the end-of-text token."""

    def __init__(
        self,
        config: TextConfig,
        embed_dim: int,
        *,
        attention_backend: str = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        block = BlockConfig(
            width=config.width,
            num_heads=config.num_heads,
            mlp_hidden=int(config.width * config.mlp_ratio),
            mlp=config.activation,
            norm_eps=config.norm_eps,
            causal=True,
            attention_backend=attention_backend,
        )
        self.blocks = BlockStack(block, config.depth, checkpointing=activation_checkpointing)
        self.norm = Norm(config.width, eps=config.norm_eps, backend=attention_backend)
        self.head = nn.Linear(config.width, embed_dim, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter of the tower, with CLIP's standard deviations."""
        init_layers(self)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode sentences.

        Args:
            tokens: (B, L) int64, L <= context_length. The end-of-text token has the highest id,
                so that argmax finds it; what follows it is padding.

        Returns:
            (B, E) in the parameters' dtype.

        Raises:
            ValueError: if the tokens' shape does not fit the config.
        """
        x = self._embed(tokens)
        return self.head(self.norm(self.blocks(x, None, tokens.argmax(dim=-1))))

    def with_words(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode sentences and their words in one pass: as `VideoEncoder.with_patches`.

        Args:
            tokens: As `forward`.

        Returns:
            (B, E) as `forward`, to the bit; and (B, L, D), the tokens as the last block meets them.
        """
        x = self.blocks.all_but_last(self._embed(tokens), None)
        pooled = self.blocks.pool(x, None, tokens.argmax(dim=-1))
        return self.head(self.norm(pooled)), x

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Encode every token: what heads that attend to words want.

        Args:
            tokens: As `forward`.

        Returns:
            (B, L, D), the last block's output after the final norm; `head` of the end-of-text
            token's row is what `forward` returns.
        """
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Tokens and their positions, (B, L, D), in the blocks' dtype."""
        length = self.config.context_length
        if tokens.dim() != 2 or tokens.shape[1] > length:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; this model takes (B, L), L <= {length}"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return x.to(compute_dtype(x))
