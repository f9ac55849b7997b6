"""The towers against their published sizes, the paper's equations, and their own options."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kernels.st_rope import st_rope_tables
from lightning_modules.models import (
    PRESETS,
    DualEncoder,
    DualEncoderConfig,
    ModelConfig,
    TextConfig,
    VideoEncoder,
    VisionConfig,
    build_dual_encoder,
)
from lightning_modules.models.config import CLIP_MEAN, CLIP_STD
from lightning_modules.models.layers import Block, BlockConfig, DropPath, init_layers

VISION = VisionConfig(
    image_size=16, patch_size=4, width=32, depth=2, num_heads=2, mlp_hidden=40, num_frames=3
)
TEXT = TextConfig(context_length=8, vocab_size=32, width=16, depth=1, num_heads=2)
SMALL = DualEncoderConfig(VISION, TEXT, embed_dim=12)
CLIP_VISION = replace(
    VISION, architecture="clip", activation="quick_gelu", norm_eps=1e-5, temporal="learnable"
)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter away from the value it is initialised with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def clips(batch: int = 2, frames: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, frames, size, size)


# model-facts: visual and text parameters of the image checkpoints, without temporal positions
COUNTS = {
    "eva02_at_base_16": (86_263_040, 63_428_096),
    "eva02_at_large_14": (304_105_152, 123_650_304),
    "eva02_at_large_14_336": (304_432_832, 123_650_304),
    "clip_vit_base_16": (86_192_640, 63_428_096),
    "clip_vit_large_14": (303_966_208, 123_650_304),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        model = build_dual_encoder(preset, num_frames=4)
    visual, text = (sum(p.numel() for p in t.parameters()) for t in (model.visual, model.text))
    assert (visual - 4 * PRESETS[preset].vision.width, text) == COUNTS[preset]


@pytest.mark.parametrize("vision", [VISION, CLIP_VISION], ids=["eva02", "clip"])
def test_no_parameter_is_forgotten_by_init(vision: VisionConfig) -> None:
    model = DualEncoder(replace(SMALL, vision=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert [n for n, p in model.named_parameters() if not p.isfinite().all()] == []
    assert model.visual.temporal_embed.eq(0).all()
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def equations(  # noqa: C901 - loops are the point: nothing to be clever in
    model: VideoEncoder, video: torch.Tensor, temporal: str
) -> torch.Tensor:
    """Eqs. 7-10 and EVA-02's block, token by token and head by head, in float64."""
    c, p = model.config, {k: v.double() for k, v in model.state_dict().items()}
    side, dim = c.grid[0], c.head_dim

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], c.norm_eps)

    def angle(t: int, row: int, column: int, i: int) -> float:
        half, pairs = dim // 4, dim // 2
        place = row if i < half else column
        total = place / side * 16 * 10000.0 ** (-(i % half) / half)
        return total + (t * 10000.0 ** (-i / pairs) if temporal in ("rotary", "both") else 0.0)

    outputs = []
    for clip in video.double():
        tokens, places = [p["cls_token"][0, 0] + p["pos_embed"][0, 0]], [None]
        for t in range(clip.shape[1]):
            for row in range(side):
                for column in range(side):
                    y, x = row * c.patch_size, column * c.patch_size
                    patch = clip[:, t, y : y + c.patch_size, x : x + c.patch_size]
                    token = (p["patch_embed.weight"] * patch).sum((1, 2, 3)) + p["patch_embed.bias"]
                    token = token + p["pos_embed"][0, 1 + row * side + column]
                    if temporal in ("learnable", "both"):
                        token = token + p["temporal_embed"][t]
                    tokens.append(token)
                    places.append((t, row, column))
        x = torch.stack(tokens)
        turn = torch.tensor(
            [[angle(*place, i) if place else 0.0 for i in range(dim // 2)] for place in places],
            dtype=torch.float64,
        )
        for b in range(c.depth):
            name = f"blocks.{b}"
            h = norm(x, f"{name}.norm1")
            q, k, v = (h @ p[f"{name}.attn.qkv.weight"].t()).chunk(3, dim=-1)
            q, v = q + p[f"{name}.attn.qkv.q_bias"], v + p[f"{name}.attn.qkv.v_bias"]
            heads = []
            for head in range(c.num_heads):
                own = slice(head * dim, (head + 1) * dim)
                rotated = []
                for z in (q[:, own], k[:, own]):
                    even, odd = z[:, 0::2], z[:, 1::2]
                    pair = (
                        even * turn.cos() - odd * turn.sin(),
                        even * turn.sin() + odd * turn.cos(),
                    )
                    rotated.append(torch.stack(pair, -1).flatten(1))
                weights = (rotated[0] @ rotated[1].t() * dim**-0.5).softmax(-1)
                heads.append(weights @ v[:, own])
            h = norm(torch.cat(heads, -1), f"{name}.attn.norm")
            x = x + h @ p[f"{name}.attn.proj.weight"].t() + p[f"{name}.attn.proj.bias"]
            h = norm(x, f"{name}.norm2") @ p[f"{name}.mlp.w12.weight"].t()
            gate, value = (h + p[f"{name}.mlp.w12.bias"]).chunk(2, -1)
            h = norm(F.silu(gate) * value, f"{name}.mlp.norm")
            x = x + h @ p[f"{name}.mlp.fc2.weight"].t() + p[f"{name}.mlp.fc2.bias"]
        outputs.append(p["head.weight"] @ norm(x[0], "norm") + p["head.bias"])
    return torch.stack(outputs)


@pytest.mark.parametrize("temporal", ["none", "learnable", "rotary", "both"])
def test_video_tower_is_the_papers_equations(temporal: str) -> None:
    torch.manual_seed(0)
    config = replace(VISION, temporal=temporal)
    model = randomise(VideoEncoder(config, 12)).double().eval()
    video = clips().double()
    with torch.no_grad():
        # tables, softmax and sums in another order: some hundred roundings of 1e-16
        torch.testing.assert_close(
            model(video), equations(model, video, temporal), rtol=0, atol=1e-11
        )


def test_frame_order_matters_where_time_is_encoded() -> None:
    torch.manual_seed(0)
    video = clips().double()
    for temporal in ("none", "learnable", "rotary", "both", "split"):
        model = randomise(VideoEncoder(replace(VISION, temporal=temporal), 12)).double().eval()
        change = (model(video) - model(video.flip(2))).abs().max().item()
        assert (change < 1e-12) == (temporal == "none"), (temporal, change)


def test_only_both_and_learnable_add_a_parameter() -> None:
    counts = {
        t: sum(p.numel() for p in VideoEncoder(replace(VISION, temporal=t), 12).parameters())
        for t in ("none", "learnable", "rotary", "both", "split")
    }
    extra = VISION.num_frames * VISION.width
    assert counts["none"] == counts["rotary"]
    assert counts["learnable"] == counts["both"] == counts["split"] == counts["none"] + extra


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uint8_equals_normalised_float(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = randomise(DualEncoder(SMALL)).to(dtype).eval()
    pixels = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1, 1) for v in (CLIP_MEAN, CLIP_STD)
    )
    normalised = ((pixels.double() / 255 - mean) / std).to(dtype)
    # one rounding of the folded weights and of each product
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(
        model.encode_video(pixels), model.encode_video(normalised), rtol=0, atol=tolerance
    )


def test_uint8_gradients_equal_normalised_float() -> None:
    torch.manual_seed(0)
    model = randomise(VideoEncoder(VISION, 12)).double()
    pixels = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1, 1) for v in (CLIP_MEAN, CLIP_STD)
    )
    gradients = []
    for video in (pixels, (pixels.double() / 255 - mean) / std):
        model.zero_grad()
        model(video).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_uint8_in_bfloat16_is_as_exact_as_normalised_float() -> None:
    torch.manual_seed(0)
    patch_embed = randomise(VideoEncoder(VISION, 12)).patch_embed
    pixels = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    normalised = (pixels / 255 - mean) / std
    exact = patch_embed(normalised)
    patch_embed.bfloat16()
    folded, plain = (
        (patch_embed(video).float() - exact).square().mean().sqrt()
        for video in (pixels, normalised)
    )
    assert folded < 1.5 * plain, (folded, plain)


def test_forward_normalises_and_exponentiates() -> None:
    model = build_dual_encoder(SMALL)
    tokens = torch.randint(0, 32, (2, 8))
    video, text, scale = model(clips(), tokens)
    assert video.shape == text.shape == (2, 12)
    torch.testing.assert_close(video.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(scale, torch.tensor([1 / 0.07]))


def test_bfloat16_parameters_take_float_video_and_give_float32() -> None:
    model = build_dual_encoder(SMALL)
    tokens = torch.randint(0, 32, (2, 8))
    video = clips()
    exact = model.encode_video(video)
    low = model.bfloat16()
    for got in (low.encode_video(video), low.encode_text(tokens)):
        assert got.dtype == torch.float32
    # bf16 keeps 8 bits: a few roundings of 4e-3 on a unit vector
    torch.testing.assert_close(low.encode_video(video), exact, rtol=0, atol=3e-2)


def test_text_is_causal_and_pools_at_end_of_text() -> None:
    torch.manual_seed(0)
    text = randomise(DualEncoder(SMALL)).double().text
    tokens = torch.tensor([[30, 4, 5, 31, 0, 0, 0, 0]])
    longer = torch.tensor([[30, 4, 5, 31, 9, 9, 9, 9]])
    torch.testing.assert_close(text(tokens), text(longer))  # what follows EOT is not seen
    torch.testing.assert_close(text(tokens), text(tokens[:, :4]))
    assert not torch.allclose(text(tokens), text(torch.tensor([[30, 4, 6, 31, 0, 0, 0, 0]])))


def test_last_block_alone_computes_only_the_pooled_token() -> None:
    """The towers equal ones that carry every token through the last block."""
    torch.manual_seed(0)
    model = randomise(DualEncoder(SMALL)).double()
    video, tokens = clips().double(), torch.randint(0, 32, (2, 8))

    def whole(stack, x, tables, index):
        for block in stack:
            x = block(x, tables)
        return x[torch.arange(len(x)), index]

    gradients = []
    for forward in (None, whole):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if forward is not None:
                patch.setattr(type(model.visual.blocks), "forward", forward)
            (model.visual(video).square().sum() + model.text(tokens).square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_activation_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = randomise(build_dual_encoder(SMALL, drop_path=0.3)).double()
    saving = build_dual_encoder(SMALL, drop_path=0.3, activation_checkpointing=True).double()
    saving.load_state_dict(plain.state_dict())
    assert saving.visual.blocks.checkpointing and saving.text.blocks.checkpointing
    video, tokens = clips().double(), torch.randint(0, 32, (2, 8))
    gradients = []
    for model in (plain, saving):
        torch.manual_seed(1)
        a, b, scale = model.train()(video, tokens)
        (a @ b.t() * scale).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    torch.manual_seed(0)
    plain = randomise(build_dual_encoder(SMALL))
    compiled = build_dual_encoder(SMALL, compile_blocks=True)
    compiled.load_state_dict(plain.state_dict())
    video, tokens = clips(), torch.randint(0, 32, (2, 8))
    results = []
    for model in (plain, compiled):
        a, b, _ = model.train()(video, tokens)
        (a @ b.t()).square().sum().backward()
        results.append((a, b, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # fused operations round apart


def test_compilation_keeps_names() -> None:
    compiled = build_dual_encoder(SMALL, compile_blocks=True)
    assert all(b._compiled_call_impl for b in (*compiled.visual.blocks, *compiled.text.blocks))
    assert compiled.state_dict().keys() == build_dual_encoder(SMALL).state_dict().keys()


def test_patch_dropout_keeps_the_same_patches_in_all_frames() -> None:
    torch.manual_seed(0)
    config = replace(VISION, patch_dropout=0.5)
    model = randomise(VideoEncoder(config, 12)).double().train()
    video = clips(batch=3).double()
    seen: list[tuple] = []
    model.blocks.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(video)
    tokens, tables, _ = seen[0]
    assert tokens.shape == (3, 1 + 3 * 8, 32) and tables.spatial.shape == (3, 8, 8, 2)
    model.eval()(video)
    whole, full, _ = seen[1]
    for clip in range(3):
        kept = [
            next(n for n in range(16) if torch.equal(full.spatial[n], row))
            for row in tables.spatial[clip]
        ]
        patches = whole[clip, 1:].unflatten(0, (3, 16))[:, kept].flatten(0, 1)
        torch.testing.assert_close(tokens[clip, 1:], patches)
        torch.testing.assert_close(tokens[clip, 0], whole[clip, 0])
    assert len({tuple(t.flatten().tolist()) for t in tables.spatial}) > 1


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    out = layer(torch.ones(4000, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out[:, 0], out[:, 2])
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)  # 4 standard errors
    assert torch.equal(layer.eval()(out), out)
    stack = build_dual_encoder(SMALL, drop_path=0.2).visual.blocks
    assert [block.drop_path.rate for block in stack] == [0.0, 0.2]


def test_both_branches_of_a_block_can_be_dropped() -> None:
    torch.manual_seed(0)
    block = randomise(build_dual_encoder(SMALL).visual.blocks[0]).train()
    block.drop_path.rate = 1 - 1e-6  # torch.rand stays below it with this seed
    x = torch.randn(4, 5, 32)
    assert torch.equal(block(x), x)
    assert not torch.allclose(block.eval()(x), x)


def test_another_number_of_frames_resamples_time() -> None:
    torch.manual_seed(0)
    model = randomise(VideoEncoder(replace(VISION, num_frames=2), 12)).eval()
    four = VideoEncoder(replace(VISION, num_frames=4), 12).eval()
    p = model.temporal_embed.detach()
    state = model.state_dict()
    state["temporal_embed"] = torch.stack(
        [p[0], 0.75 * p[0] + 0.25 * p[1], 0.25 * p[0] + 0.75 * p[1], p[1]]
    )
    four.load_state_dict(state)
    video = clips(frames=4)
    torch.testing.assert_close(model(video), four(video))


def test_reference_frames_rescales_rotary_time() -> None:
    torch.manual_seed(0)
    config = replace(VISION, temporal="rotary", num_frames=4)
    plain = randomise(VideoEncoder(config, 12)).double().eval()
    rescaled = VideoEncoder(replace(config, reference_frames=2), 12).double().eval()
    rescaled.load_state_dict(plain.state_dict())
    video = clips(frames=4).double()
    assert not torch.allclose(plain(video), rescaled(video))
    torch.testing.assert_close(plain(video[:, :, :2]), rescaled(video[:, :, :2]))


def test_centred_time_of_frames_shown_twice_is_that_of_the_frames() -> None:
    """Each frame shown k times: k samples around the frame's own time, which is their mean.

    `linear`, whose first sample is at the frame's own time, is late by (1 - 1/k)/2.
    """
    config = replace(VISION, temporal="rotary", num_frames=4, reference_frames=4)
    for k in (1, 2, 3, 8):
        times = {}
        for scaling in ("linear", "centred"):
            model = VideoEncoder(replace(config, time_scaling=scaling), 12)
            tables = model._rotation_tables(torch.zeros(1, 4 * k, 1, 1, dtype=torch.float64))
            pairs = tables.temporal.shape[1]
            pair = tables.temporal[:, pairs // 2]  # it turns by theta^(-1/2) = 1/100 a frame
            times[scaling] = (100 * torch.atan2(pair[:, 1], pair[:, 0])).view(4, k).mean(1)
        own = torch.arange(4, dtype=torch.float64)
        torch.testing.assert_close(times["centred"], own)
        torch.testing.assert_close(times["linear"], own + (1 - 1 / k) / 2)


@pytest.mark.parametrize("temporal", ["rotary", "split"])
def test_ntk_scaling_slows_the_slow_and_leaves_the_fast(temporal: str) -> None:
    """Eight frames for four: the slowest pair turns as if t were halved, the fastest as it did."""
    frames, head_dim = 8, 64
    plain, stretched, halved = (
        st_rope_tables((1, 1), frames, head_dim, mode=temporal, **more).temporal
        for more in (
            {},
            {"temporal_stretch": 2.0},
            {"temporal_positions": [t / 2 for t in range(frames)]},
        )
    )
    pairs = 32 if temporal == "rotary" else 8
    torch.testing.assert_close(stretched[:, 0], plain[:, 0])
    torch.testing.assert_close(stretched[:, pairs - 1], halved[:, pairs - 1])
    slowdown = [
        float(torch.atan2(*plain[1, i].flip(0)) / torch.atan2(*stretched[1, i].flip(0)))
        for i in range(pairs)
    ]
    assert slowdown == pytest.approx([2 ** (i / (pairs - 1)) for i in range(pairs)])


def test_ntk_scaling_in_the_model() -> None:
    torch.manual_seed(0)
    config = replace(VISION, temporal="rotary", num_frames=4, reference_frames=3)
    plain = randomise(VideoEncoder(replace(config, reference_frames=None), 12)).double().eval()
    video = clips(frames=4).double()
    found = {}
    for scaling in ("linear", "ntk"):
        other = VideoEncoder(replace(config, time_scaling=scaling), 12).double().eval()
        other.load_state_dict(plain.state_dict())
        found[scaling] = other(video)
        # no more frames than the reference: NTK leaves frame indices, linear stretches them
        for short, same in ((3, True), (2, scaling == "ntk")):
            part = video[:, :, :short]
            assert torch.allclose(plain(part), other(part)) == same
    assert not torch.allclose(found["ntk"], found["linear"])
    assert not torch.allclose(found["ntk"], plain(video))


def test_temporal_positions_start_where_the_config_says() -> None:
    torch.manual_seed(0)
    start = VideoEncoder(replace(VISION, width=768, num_frames=64, temporal_init_std=0.02), 12)
    assert start.temporal_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert VideoEncoder(VISION, 12).temporal_embed.eq(0).all()
    for wrong, told in (
        ({"temporal_init_std": -1.0}, "may not be negative"),
        ({"time_scaling": "yarn"}, "time_scaling is 'yarn'; one of: linear, centred, ntk"),
    ):
        with pytest.raises(ValueError, match=told):
            replace(VISION, **wrong)


def test_weight_decay_and_layer_ids() -> None:
    model = build_dual_encoder(SMALL)
    undecayed = model.no_weight_decay()
    decayed = {n for n, _ in model.named_parameters()} - undecayed
    assert all(n.endswith(".weight") and "norm" not in n for n in decayed)
    assert {
        "logit_scale",
        "visual.pos_embed",
        "visual.cls_token",
        "text.positional_embedding",
    } <= undecayed
    assert "visual.temporal_embed" in undecayed and "visual.blocks.0.attn.qkv.q_bias" in undecayed
    assert "text.token_embedding.weight" in decayed
    # vision has two blocks, text one: both end at layer 2
    assert model.num_layers == 2
    for name, layer in {
        "visual.patch_embed.weight": 0,
        "visual.pos_embed": 0,
        "visual.blocks.0.norm1.weight": 1,
        "visual.blocks.1.attn.proj.weight": 2,
        "text.token_embedding.weight": 1,
        "text.blocks.0.mlp.fc1.weight": 2,
        "visual.head.weight": 3,
        "text.norm.bias": 3,
        "logit_scale": 3,
    }.items():
        assert model.layer_id(name) == layer, name
    with pytest.raises(ValueError, match="no parameter"):
        model.layer_id("encoder.weight")


def test_model_config_builds_what_it_says() -> None:
    config = ModelConfig(preset="eva02_at_tiny", embed_dim=20, num_frames=2, temporal="split")
    model = DualEncoder(config.resolve())
    assert model.config.embed_dim == 20 and model.visual.config.num_frames == 2
    assert model.visual.config.temporal == "split"
    assert ModelConfig(preset="eva02_at_tiny", embed_dim=None).resolve() == PRESETS["eva02_at_tiny"]


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("eva02", {}, "unknown preset 'eva02'.*eva02_at_base_16"),
        (SMALL, {"frames": 4}, "unknown override frames"),
        (SMALL, {"temporal": "divided"}, "'divided'; one of: none"),
        (SMALL, {"image_size": 15}, "no multiple of patch_size 4"),
        (SMALL, {"patch_dropout": 1.0}, r"patch_dropout is 1.0.*\[0, 1\)"),
        (SMALL, {"num_frames": 0}, "at least 1"),
        ("clip_vit_base_16", {"temporal": "both"}, "no rotary positions"),
    ],
)
def test_impossible_configs_are_one_clear_error(preset, overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_dual_encoder(preset, **overrides)


def test_wrong_inputs_are_one_clear_error() -> None:
    model = build_dual_encoder(SMALL)
    with pytest.raises(ValueError, match=r"\(B, 3, T, 16, 16\)"):
        model.encode_video(clips(size=12))
    with pytest.raises(ValueError, match="uint8 pixels or normalised floats"):
        model.encode_video(clips().long())
    with pytest.raises(ValueError, match="L <= 8"):
        model.encode_text(torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="cannot run on cpu"):
        build_dual_encoder(SMALL, attention_backend="xformers").encode_video(clips())


def test_padding_to_16_bytes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 x 14 patches have 588 numbers, the L model's MLP 2,730 channels: no multiples of 8."""
    vision = VisionConfig(28, 14, width=16, depth=2, num_heads=2, mlp_hidden=43, num_frames=2)
    model = randomise(VideoEncoder(vision, 8)).double()
    video = clips(frames=2, size=28).double()
    shapes: list[tuple[int, ...]] = []
    for part in (model.patch_embed, model.blocks[0].mlp.norm):
        part.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    results = []
    linear = F.linear
    for alignment in (8, 1):
        monkeypatch.setattr("lightning_modules.models.layers.ALIGNMENT", alignment)
        monkeypatch.setattr("lightning_modules.models.vision.ALIGNMENT", alignment)
        widths: set[int] = set()

        def watched(x, weight, bias=None, widths=widths):
            widths.update(weight.shape)
            return linear(x, weight, bias)

        monkeypatch.setattr("torch.nn.functional.linear", watched)
        model.zero_grad()
        out = model(video)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        padded = {588: 592, 43: 48, 86: 96} if alignment == 8 else {588: 588, 43: 43, 86: 86}
        assert widths >= set(padded.values()), widths
        assert alignment == 1 or not widths & set(padded), widths
    # float64: the same sums, with zeros between them
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert own["blocks.0.mlp.w12.weight"] == (86, 16) and own["blocks.0.mlp.fc2.weight"] == (16, 43)
    assert own["patch_embed.weight"] == (16, 3, 14, 14)


@pytest.mark.parametrize("architecture", ["eva02", "clip"])
def test_autocast_reaches_the_residual_stream(architecture: str) -> None:
    """Every module of a tower hands on bf16, where PyTorch's norms would return to float32."""
    temporal = "both" if architecture == "eva02" else "learnable"
    vision = VisionConfig(
        16, 8, 16, 2, 2, mlp_hidden=43, architecture=architecture, num_frames=3, temporal=temporal
    )
    config = DualEncoderConfig(vision, TextConfig(8, 50, 16, 2, 2), 8)
    model = randomise(DualEncoder(config))
    types: dict[str, torch.dtype] = {}
    for name, part in model.named_modules():
        part.register_forward_hook(
            lambda module, args, out, name=name: (
                types.__setitem__(name, out.dtype) if isinstance(out, torch.Tensor) else None
            )
        )
    video = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    tokens = torch.tensor([[3, 4, 49, 0], [5, 49, 0, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        low = model(video, tokens)
    assert {n: t for n, t in types.items() if t != torch.bfloat16} == {
        "text.token_embedding": torch.float32  # a table look-up; cast once, with the positions
    }
    exact = model(video, tokens)
    for one, other in zip(low[:2], exact[:2], strict=True):
        assert one.dtype == torch.float32
        # two blocks in 8 bits; embeddings have length 1
        torch.testing.assert_close(one, other, rtol=0, atol=3e-2)


def test_a_padded_block_compiles_to_one_graph_under_autocast() -> None:
    tables = st_rope_tables((2, 2), 3, 16, dtype=torch.float32)
    config = BlockConfig(32, 2, 43, "swiglu", 1e-6, key_bias=False, inner_norm=True)
    block = Block(config)
    init_layers(block)
    x = torch.randn(2, 13, 32, dtype=torch.bfloat16)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x, tables)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        results.append([out, *(parameter.grad.clone() for parameter in block.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=0)
