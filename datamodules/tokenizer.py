"""CLIP's byte-pair tokenizer: OpenAI's vocabulary and cleaning, on the `tokenizers` library."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import ftfy
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

VOCABULARY = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
SOT_ID, EOT_ID, VOCABULARY_SIZE = 49406, 49407, 49408
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# Words are: contractions, runs of letters, single digits, runs of anything else but space.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """Repair mojibake and HTML entities (doubly escaped ones too), squeeze spaces, lower-case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _byte_symbols() -> list[str]:
    """One printable character a byte, in the order in which the vocabulary numbers them.

    Printable bytes stand for themselves and come first; the others follow, as code points from
    256 on: `Ā` is byte 0, `Ġ` the space (33rd of the others).
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    return [chr(b) for b in own] + [chr(256 + i) for i in range(256 - len(own))]


@lru_cache(maxsize=1)
def _byte_pair_encoder() -> tokenizers.Tokenizer:
    symbols = _byte_symbols()
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")
    # The first line is a header; the file lists more merges than CLIP uses.
    num_merges = VOCABULARY_SIZE - 2 * len(symbols) - len(_SPECIAL)
    merges = [(left, right) for left, right in map(str.split, lines[1 : num_merges + 1])]
    words = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), *_SPECIAL]
    encoder = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.add_special_tokens(list(_SPECIAL))
    return encoder


class Tokenizer:
    """Text to CLIP's token ids.

    Args:
        context_length: Row length; longer texts are cut and keep the end token as their last.
        pad_to_multiple_of: If given, rows are only as long as the longest text of a call needs,
            rounded up to a multiple of this. The text tower is causal and pools the end token, so
            padding changes no embedding, and narrations fill a tenth of 77 tokens.

    Example:
        >>> Tokenizer()(["#C C opens a drawer"])[0, :7].tolist()
        [49406, 258, 322, 322, 4801, 320, 23219]
    """

    def __init__(self, context_length: int = 77, pad_to_multiple_of: int | None = None) -> None:
        if context_length < 3:
            raise ValueError(f"context_length is {context_length}; start, one word, end need 3")
        self.context_length = context_length
        self.pad_to_multiple_of = pad_to_multiple_of

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without start and end."""
        return _byte_pair_encoder().encode(clean(text), add_special_tokens=False).ids

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Return (B, L) int64 ids, L <= context_length: start, words, end, zeros.

        Args:
            texts: B texts (a single one counts as B = 1).
        """
        texts = [texts] if isinstance(texts, str) else texts
        words = [self.encode(text)[: self.context_length - 2] for text in texts]
        length, multiple = self.context_length, self.pad_to_multiple_of
        if multiple:
            longest = 2 + max(map(len, words), default=0)
            length = min(length, -(-longest // multiple) * multiple)
        tokens = torch.zeros(len(words), length, dtype=torch.int64)
        for row, ids in zip(tokens, words, strict=True):
            row[: len(ids) + 2] = torch.tensor([SOT_ID, *ids, EOT_ID])
        return tokens
