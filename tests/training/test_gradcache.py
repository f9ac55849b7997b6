"""GradCache: k micro-batches are one big batch, gradients included, over ranks too."""

import pytest
import torch
from gloo_ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.losses import InfoNCELoss
from lightning_modules.models import DualEncoderConfig, TextConfig, VisionConfig, build_dual_encoder
from lightning_modules.training.optim.gradcache import encode_in_micro_batches


def build():
    torch.manual_seed(0)
    vision = VisionConfig(
        image_size=32, patch_size=16, width=32, depth=2, num_heads=2, mlp_hidden=48, num_frames=2
    )
    text = TextConfig(context_length=12, vocab_size=50, width=32, depth=2, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(vision, text, embed_dim=16)).double()


def pairs(count):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(count, 3, 2, 32, 32, generator=generator)
    tokens = torch.randint(1, 49, (count, 12), generator=generator)
    tokens[:, 9] = 49
    return video, tokens


class Step(nn.Module):
    """What DDP wraps in a run: the whole training step."""

    def __init__(self, micro_batch):
        super().__init__()
        self.model, self.micro_batch = build(), micro_batch

    def forward(self, video, tokens):
        video, text, scale = encode_in_micro_batches(self.model, video, tokens, self.micro_batch)
        return InfoNCELoss(temperature=None)(video, text, logit_scale=scale)


def gradients(step, inputs):
    """Loss and gradients of one contrastive batch."""
    loss = step(*inputs)
    loss.backward()
    named = getattr(step, "module", step).model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named}


def assert_same(found, expected):
    # fp64: the gradients of the micro-batches are summed in another order; the loss stays in fp32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    largest = max(g.abs().max() for g in expected[1].values())
    for name, gradient in expected[1].items():
        difference = (found[1][name] - gradient).abs().max()
        assert difference <= 1e-7 * largest, f"{name}: {difference} of {largest}"


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_micro_batches_equal_one_batch(micro_batch):
    inputs = pairs(7)  # 4 leaves an uneven rest
    assert_same(gradients(Step(micro_batch), inputs), gradients(Step(None), inputs))


def test_the_encoder_never_sees_more_than_a_micro_batch():
    step, sizes = Step(2), []
    step.model.visual.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    gradients(step, pairs(6))
    assert sizes == [2] * 6  # three forward, three again in the backward pass


def _rank(rank, micro_batch):
    step = DistributedDataParallel(Step(micro_batch))
    return gradients(step, [part.chunk(2)[rank] for part in pairs(8)])


@pytest.mark.distributed
def test_micro_batches_on_two_ranks_equal_one_process():
    expected = gradients(Step(None), pairs(8))
    for found in run_ranks(2, _rank, 3):
        assert_same(found, expected)
