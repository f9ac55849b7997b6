"""Key layouts of published CLIP-like checkpoints, translated to this project's own.

Read here: BAAI's EVA-CLIP, open_clip/timm's EVA02, OpenAI's and open_clip's ViT, AVION's ViT, and
this project's own. `docs/model.md` holds the table of keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_PREFIX = re.compile(r"^(?:module\.|model\.|_orig_mod\.)+")
_VISUAL_MARKS = ("cls_token", "class_embedding", "conv1.weight", "patch_embed.proj.weight")
# What AVION's code fixes and no shape tells: nn.GELU in both towers, epsilon 1e-6 in the video one
# (avion/models/transformer.py), whatever weights a run started from.
_AVION: dict[str, str | float] = {
    "vision.activation": "gelu",
    "vision.norm_eps": 1e-6,
    "text.activation": "gelu",
}
_AVION_MARKS = ("visual.image_projection", "visual.temporal_embedding")
_ROTARY = re.compile(r"(^|\.)rope\.")

# (pattern of a key within its tower, replacement), applied in this order.
_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^transformer\.resblocks\.", "blocks."),
        (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
        (r"\.attn\.(in_proj_weight|Wqkv\.weight)$", ".attn.qkv.weight"),
        (r"\.attn\.(in_proj_bias|Wqkv\.bias)$", ".attn.qkv.bias"),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.attn\.([qkv])_(proj\.)?bias$", r".attn.qkv.\1_bias"),
        (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        (r"\.mlp\.fc1_g\.", ".mlp.w1."),
        (r"\.mlp\.fc1_x\.", ".mlp.w2."),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"^class_embedding$", "cls_token"),
        (r"^temporal_embedding$", "temporal_embed"),
        (r"^patch_embed\.proj\.", "patch_embed."),
        (r"^conv1\.", "patch_embed."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_(post|final)\.", "norm."),
    )
)
# Projections stored as (width, E) matrices: the transpose of a Linear's weight.
_TRANSPOSED_HEADS = ("proj", "text_projection", "image_projection")
# Ours -> the parts that other layouts store separately, in the order of concatenation.
_PACKED_PARTS = {
    "attn.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "mlp.w12.weight": ("mlp.w1.weight", "mlp.w2.weight"),
    "mlp.w12.bias": ("mlp.w1.bias", "mlp.w2.bias"),
}


@dataclass
class Translation:
    """A checkpoint in this project's keys.

    Attributes:
        tensors: Our key -> tensor, of the shapes the file has.
        sources: Our key -> the file's keys it was made of.
        ignored: Keys of the file that mean nothing here (rotary tables, other modules).
        settings: Fields of the configuration that follow from whose layout it is, by their dotted
            names (`vision.norm_eps`); shapes do not tell them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    settings: dict[str, str | float] = field(default_factory=dict)

    def add(self, key: str, tensor: Tensor, sources: tuple[str, ...]) -> None:
        """Add one tensor; two keys of a file for one parameter are an error."""
        if key in self.tensors:
            raise ValueError(
                f"the checkpoint holds {key!r} twice: as {', '.join(self.sources[key])} and as "
                f"{', '.join(sources)}. Remove one of them."
            )
        self.tensors[key] = tensor
        self.sources[key] = sources


def unwrap(content: object) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, out of its wrappers and without wrapper prefixes.

    Args:
        content: What the file holds: keys to tensors, or a mapping that holds one of them under
            `state_dict`, `model`, `module` or `model_state_dict`, at any depth.

    Raises:
        ValueError: if no tensors are found.
    """
    while isinstance(content, Mapping):
        inner = next((content[w] for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[_PREFIX.sub("", key)] = value
    if not tensors:
        raise ValueError(
            "the checkpoint holds no tensors: expected keys to tensors, possibly wrapped in "
            f"{', '.join(_WRAPPERS)}"
        )
    return tensors


def translate(tensors: Mapping[str, Tensor]) -> Translation:
    """Translate the keys of any supported layout to `DualEncoder`'s.

    Args:
        tensors: Keys to tensors, as `unwrap` returns them.
    """
    found = Translation(settings=dict(_AVION) if _is_avions(tensors) else {})
    parts: dict[str, tuple[Tensor, str]] = {}
    place = _tower_of(tensors)
    for key, tensor in tensors.items():
        tower, rest = place(key)
        if tower is None or _ROTARY.search(rest):
            found.ignored.append(key)
        elif tower == "":
            found.add("logit_scale", tensor.reshape(1), (key,))
        else:
            _add(found, parts, tower, rest, key, tensor)
    _join_parts(found, parts)
    return found


def _is_avions(keys: Iterable[str]) -> bool:
    """AVION's ViT has OpenAI's blocks, with a time and a projection that OpenAI's has not."""
    known = set(keys)
    blocks = any(key.startswith("visual.transformer.resblocks.") for key in known)
    return blocks and not known.isdisjoint(_AVION_MARKS)


def _tower_of(keys: Iterable[str]) -> Callable[[str], tuple[str | None, str]]:
    """Return key -> (tower, key within it): "visual", "text", "" for logit_scale, None for others.

    A key without prefix belongs to the text tower (OpenAI's layout), unless the file is a video
    or image tower alone, which its class token or patch embedding at top level gives away.
    """
    bare_tower = "visual" if any(mark in keys for mark in _VISUAL_MARKS) else "text"

    def place(key: str) -> tuple[str | None, str]:
        if key == "logit_scale":
            return "", key
        if key == "image_projection":
            return "visual", key
        if key == "text_projection":
            return "text", key
        for prefix, tower in (
            ("visual.trunk.", "visual"),
            ("visual.", "visual"),
            ("textual.", "text"),
            ("text.", "text"),
        ):
            if key.startswith(prefix):
                return tower, key.removeprefix(prefix)
        return bare_tower, key

    return place


def _add(
    found: Translation,
    parts: dict[str, tuple[Tensor, str]],
    tower: str,
    rest: str,
    source: str,
    tensor: Tensor,
) -> None:
    """Translate one key of a tower; parts of a packed matrix wait for their companions."""
    for pattern, replacement in _RENAMES:
        rest = pattern.sub(replacement, rest)
    if tower == "visual" and rest == "positional_embedding":  # the text tower's name is its own
        rest = "pos_embed"
    key = f"{tower}.{rest}"
    if rest in _TRANSPOSED_HEADS and tensor.dim() == 2:
        found.add(f"{tower}.head.weight", tensor.t(), (source,))
    elif rest.endswith(".attn.qkv.bias") and tensor.shape[0] % 3 == 0:
        for name, bias in zip("qkv", tensor.chunk(3), strict=True):
            found.add(key.replace("qkv.bias", f"qkv.{name}_bias"), bias, (source,))
    elif any(rest.endswith(part) for names in _PACKED_PARTS.values() for part in names):
        parts[key] = (tensor, source)
    else:
        found.add(key, _reshape(rest, tensor), (source,))


def _reshape(rest: str, tensor: Tensor) -> Tensor:
    """Give class token, positions and patch weights our number of dimensions."""
    if rest == "cls_token":
        return tensor.reshape(1, 1, -1)
    if rest == "pos_embed" and tensor.dim() == 2:
        return tensor[None]
    if rest == "patch_embed.weight" and tensor.dim() == 5:  # a 1 x p x p convolution
        return tensor.squeeze(2)
    if rest == "patch_embed.weight" and tensor.dim() == 2:  # AVION's matrix over (3, p, p)
        side = round((tensor.shape[1] / 3) ** 0.5)
        return tensor.unflatten(1, (3, side, side)) if 3 * side**2 == tensor.shape[1] else tensor
    return tensor


def _join_parts(found: Translation, parts: dict[str, tuple[Tensor, str]]) -> None:
    """Concatenate q, k, v and the two branches of SwiGLU; a missing part is an error."""
    while parts:
        key = next(iter(parts))
        packed, names = next(
            (packed, names)
            for packed, names in _PACKED_PARTS.items()
            if any(key.endswith(name) for name in names)
        )
        stem = next(key.removesuffix(name) for name in names if key.endswith(name))
        missing = [stem + name for name in names if stem + name not in parts]
        if missing:
            raise ValueError(
                f"the checkpoint has {parts[key][1]!r} but lacks its companions "
                f"(as {', '.join(missing)}); the file is incomplete"
            )
        tensors, sources = zip(*(parts.pop(stem + name) for name in names), strict=True)
        if len({tuple(t.shape) for t in tensors}) > 1:
            shapes = ", ".join(
                f"{s} {tuple(t.shape)}" for t, s in zip(tensors, sources, strict=True)
            )
            raise ValueError(f"these tensors of the checkpoint must have one shape: {shapes}")
        found.add(stem + packed, torch.cat(tensors), sources)
