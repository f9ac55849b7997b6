"""Training of a re-ranker: what is stopped goes on exactly, and two ranks train as one."""

import pytest
import torch
from cluster_runs import losses_of, run_stopped_once
from safetensors.torch import save_file

from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.checkpoints.source import find_checkpoint
from lightning_modules.models import DualEncoder, ModelConfig

TINY = {"preset": "eva02_at_tiny", "embed_dim": 32, "num_frames": 2, "image_size": 32}
MODEL = """
model:
  class_path: lightning_modules.rerank.RerankModule
  init_args:
    dual_checkpoint: DUAL
    model: {preset: eva02_at_tiny, embed_dim: 32, num_frames: 2, image_size: 32}
    reranker: {width: 32, depth: 2, num_heads: 2, window: 1}
    top: 4
    optimizer: {lr: 1.0e-3, schedule: cosine, warmup_epochs: 0.5}
"""


@pytest.fixture(scope="module")
def rerank_recipe(recipe, tmp_path_factory):
    """The small recipe's data and trainer, with a re-ranker of a random dual encoder."""
    folder = tmp_path_factory.mktemp("rerank")
    torch.manual_seed(1)
    dual = DualEncoder(ModelConfig(**TINY).resolve())
    save_file(dual.state_dict(), folder / "dual.safetensors")
    (folder / "dual.json").write_text(config_to_json(dual.config))
    data = recipe.read_text().partition("\ndata:")[2]
    file = folder / "recipe.yaml"
    file.write_text(MODEL.replace("DUAL", str(folder / "dual.safetensors")) + "data:" + data)
    return file


def words(recipe, folder, *more, world=2, strategy="ddp"):
    overlay = ["--config", f"configs/strategy/{strategy}.yaml"] if world > 1 else []
    precision = "32-true" if strategy == "ddp" else "bf16-mixed"
    words = ["fit", "--config", str(recipe), *overlay, f"--trainer.devices={world}"]
    return [*words, f"--run_dir={folder}", f"--trainer.precision={precision}", *more]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_stopped_reranker_goes_on_exactly(zygote, tmp_path, rerank_recipe, strategy):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = words(rerank_recipe, whole, strategy=strategy)
    done = zygote.start(tmp_path / "whole.txt", world=2, argv=argv)
    assert done.wait() == [0, 0], done.text()
    assert len(losses_of(whole)) == 12

    argv = words(rerank_recipe, parts, strategy=strategy)
    assert 0 < run_stopped_once(zygote, parts, argv) < 12
    assert losses_of(parts) == losses_of(whole)
    last = "checkpoints/step-00000012"
    states = [find_checkpoint(run / last).read_module() for run in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(name.startswith("_dual") for name in states[0])  # the head alone


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_as_one(zygote, tmp_path, rerank_recipe):
    exact = ("--model.reranker.dropout=0", "--data.val=null", "--trainer.max_epochs=2")
    for world in (1, 2):
        argv = words(rerank_recipe, tmp_path / str(world), *exact, world=world)
        done = zygote.start(tmp_path / f"{world}.txt", world=world, argv=argv)
        assert done.wait() == [0] * world, done.text()
    one, two = losses_of(tmp_path / "1"), losses_of(tmp_path / "2")
    assert len(one) == 8 and float(one[-1][1]) < float(one[0][1])
    for (step, loss), (same, other) in zip(one, two, strict=True):
        # sums in another order; Adam makes a whole step of a gradient that is all rounding
        assert step == same and float(loss) == pytest.approx(float(other), abs=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_3_is_refused_in_words(zygote, tmp_path, rerank_recipe):
    argv = words(rerank_recipe, tmp_path / "run", strategy="zero3")
    done = zygote.start(tmp_path / "run.txt", world=2, argv=argv)
    assert done.wait() == [2, 2], done.text()
    assert "train it with ddp, zero1 or zero2" in done.text()
