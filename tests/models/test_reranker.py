"""Tokens of both towers, and the head that reads them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.models import PRESETS, build_dual_encoder
from lightning_modules.models.rerank import RerankConfig, ReRanker, fingerprint, words_of

HEAD = RerankConfig(width=24, depth=2, num_heads=3, window=2, dropout=0.0)
TOKENS = torch.tensor([[9, 5, 7, 49407, 0, 0], [9, 6, 49407, 0, 0, 0], [9, 1, 2, 3, 4, 49407]])


def dual(preset: str = "eva02_at_tiny"):
    torch.manual_seed(0)
    small = {"num_frames": 2, "image_size": 64}
    return build_dual_encoder(preset, **(small if preset == "eva02_at_tiny" else {})).eval()


def head(**changes) -> ReRanker:
    torch.manual_seed(1)
    made = ReRanker(RerankConfig(**{**vars(HEAD), **changes}), dual().config).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # far from what was drawn: every part shows
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.double()


def inputs(places: int = 2, words: int = 3):
    draw = torch.Generator().manual_seed(3)
    patches = torch.randn(places, 2, 16, 96, generator=draw, dtype=torch.float64)
    states = torch.randn(words, 6, 64, generator=draw, dtype=torch.float64)
    return patches, states


@torch.no_grad()
def test_embeddings_with_tokens_are_those_without_to_the_bit():
    model = dual()
    video = torch.randint(0, 256, (3, 3, 2, 64, 64), dtype=torch.uint8)
    embedded, patches = model.encode_video_with_patches(video)
    assert torch.equal(embedded, model.encode_video(video)) and patches.shape == (3, 2, 16, 96)
    texts, words = model.encode_text_with_words(TOKENS)
    assert torch.equal(texts, model.encode_text(TOKENS)) and words.shape == (3, 6, 64)
    # the last block on the words is what `hidden_states` gives
    last = model.text.norm(model.text.blocks[-1](words))
    torch.testing.assert_close(last, model.text.hidden_states(TOKENS))


def test_words_end_with_the_end_of_text():
    assert words_of(TOKENS).sum(1).tolist() == [4, 3, 6]


def loop(model: ReRanker, patches, states, tokens, clip: int, text: int):
    """One pair, an attention head and a token at a time, without padding."""
    frames = []
    for t in range(2):
        grid = patches[clip, t].view(4, 4, 96)
        for row in (0, 2):
            for column in (0, 2):
                mean = grid[row : row + 2, column : column + 2].reshape(4, 96).mean(0)
                place = len(frames) % 4
                at = model.places.proj(model.places.norm(mean))
                where = model.places.frame_embed[t, 0] + model.places.window_embed[place]
                frames.append(at + where)
    places = torch.stack(frames)
    length = tokens[text].argmax() + 1
    words = model.word_proj(model.word_norm(states[text, :length]))
    x = torch.cat((model.query[0], words))

    def attend(q, k, v):
        size = q.shape[1] // 3
        out = []
        for h in range(3):
            part = slice(h * size, (h + 1) * size)
            weights = (q[:, part] @ k[:, part].T / size**0.5).softmax(1)
            out.append(weights @ v[:, part])
        return torch.cat(out, 1)

    for block in model.blocks:
        x = x + block.proj1(attend(*block.qkv(block.norm1(x)).chunk(3, 1)))
        x = x + block.proj2(attend(block.q(block.norm2(x)), *block.kv(places).chunk(2, 1)))
        x = x + block.fc2(F.gelu(block.fc1(block.norm3(x))))
    return model.head(model.norm(x[0]))[0]


def test_the_head_is_its_loop_whatever_pads_a_sentence():
    model = head()
    patches, states = inputs()
    places, words, mask = model.places(patches), model.words(states), words_of(TOKENS)
    clips, texts = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 1, 0, 0])
    logits = model(places, words[texts], mask[texts], clips)
    slow = [
        loop(model, patches, states, TOKENS, clip, text)
        for clip, text in zip(clips.tolist(), texts.tolist(), strict=True)
    ]
    torch.testing.assert_close(logits, torch.stack(slow), rtol=1e-10, atol=1e-12)
    assert logits.std() > 0.01
    # one clip by itself, as evaluation asks
    alone = model(places[1:], words[texts[1:3]], mask[texts[1:3]], torch.zeros(2).long())
    torch.testing.assert_close(alone, logits[1:3], rtol=1e-10, atol=1e-12)


def test_every_parameter_takes_part():
    model = head()
    patches, states = inputs()
    order = torch.tensor([0, 1, 0])
    loss = model(model.places(patches), model.words(states), words_of(TOKENS), order).sum()
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_order_of_frames_counts():
    model = head()
    patches, states = inputs()
    pair = (model.words(states), words_of(TOKENS), torch.zeros(3).long())
    one, other = (model(model.places(p)[:1], *pair) for p in (patches, patches.flip(1)))
    assert (one - other).abs().max() > 1e-4


def test_order_alone_is_learnt():
    """Two sentences, and clips of which the one is the other backwards: nothing but order tells."""
    torch.manual_seed(0)
    config = RerankConfig(width=32, depth=1, num_heads=2, window=4, dropout=0.0)
    model = ReRanker(config, dual().config)
    mask = torch.ones(64, 2, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    sentences, scene = torch.randn(2, 2, 64), torch.randn(2, 1, 96)
    losses = []
    for _ in range(40):
        backwards, other = torch.randint(0, 2, (2, 64))
        clips = torch.where(backwards.view(-1, 1, 1, 1) > 0, scene.flip(0), scene)
        clips = clips + 0.5 * torch.randn(64, 2, 16, 96)
        logits = model(model.places(clips), model.words(sentences[other]), mask, torch.arange(64))
        loss = F.binary_cross_entropy_with_logits(logits, (backwards == other).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.3  # a guess costs 0.69, as faint positions do at first


def test_fingerprint_follows_every_weight():
    model = dual()
    before = fingerprint(model)
    assert torch.equal(before, fingerprint(dual())) and before.shape == (32,)
    with torch.no_grad():
        model.text.blocks[0].mlp.fc2.bias[3] += 1e-7
    assert not torch.equal(before, fingerprint(model))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"window": 3}, "window 3 of the re-ranker does not divide the 4 x 4 patches"),
        ({"num_heads": 5}, "the heads divide the width"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_impossible_heads_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        head(**changes)


def test_other_clips_are_refused():
    with pytest.raises(ValueError, match=r"clips of 4 frames given; .* trained on 2"):
        head().places(torch.randn(1, 4, 16, 96))


def test_the_size_at_full_scale():
    with torch.device("meta"):
        made = ReRanker(RerankConfig(depth=6), PRESETS["eva02_at_base_16"])
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(26e6, rel=0.02)
    assert isinstance(made.blocks[0].kv, nn.Linear)
