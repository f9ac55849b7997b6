"""Batches, DataModules, and resuming within Lightning."""

import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.batch import ClipBatch, TextBatch
from datamodules.manifest import Manifest
from datamodules.module import RetrievalSplit
from datamodules.pretrain import PretrainDataModule
from datamodules.relevance import relevance_matrix
from datamodules.retrieval import NarrationMiner, RetrievalDataModule
from datamodules.stream.clips import own_text
from datamodules.video.decode import decode_frames


def pretrain(shards, **kwargs) -> PretrainDataModule:
    settings = {"global_batch_size": 4, "num_frames": 2, "image_size": 32, "num_workers": 0}
    return PretrainDataModule([str(shards)], **{**settings, **kwargs})


def retrieval(shards, **kwargs) -> RetrievalDataModule:
    split = RetrievalSplit(str(shards))
    settings = {"global_batch_size": 4, "num_frames": 2, "image_size": 32, "num_workers": 0}
    return RetrievalDataModule(split, split, eval_batch_size=5, **{**settings, **kwargs})


def test_a_training_batch_has_what_the_contract_says(shards, records):
    (batch, *rest) = list(pretrain(shards).train_dataloader())
    assert isinstance(batch, ClipBatch) and len(rest) == 7
    assert batch.video.shape == (4, 3, 2, 32, 32) and batch.video.dtype == torch.uint8
    assert batch.tokens.shape == (4, 16) and batch.tokens.dtype == torch.int64
    assert batch.mask.all() and batch.sample_index.tolist() == [0, 1, 2, 3]
    for b, row in enumerate(batch.clip_index.tolist()):
        assert batch.keys[b] == f"{row:09d}"
        assert batch.verb_classes[b].tolist() == list(records[row].verb_classes)
        assert batch.noun_classes[b].tolist() == list(records[row].noun_classes)
    assert torch.equal(batch.text_index, batch.clip_index)


def test_an_epoch_visits_every_clip_once_and_the_next_differs(shards):
    module = pretrain(shards)
    loader = module.train_dataloader()
    first = torch.cat([batch.clip_index for batch in loader]).tolist()
    assert sorted(first) == list(range(32))
    module.load_state_dict({**module.state_dict(), "epoch": 1})
    second = torch.cat([batch.clip_index for batch in loader]).tolist()
    assert sorted(second) == list(range(32)) and second != first


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_crops_and_texts_do_not_depend_on_workers(shards, start_method, monkeypatch):
    """Spawned ones are those that decode on a GPU."""
    monkeypatch.setattr(PretrainDataModule, "_start_method", lambda self: start_method)
    one = list(pretrain(shards).train_dataloader())
    two = list(pretrain(shards, num_workers=2).train_dataloader())
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.tokens, b.tokens)
        assert a.keys == b.keys


def test_both_texts_of_a_clip_are_drawn(shards):
    module = pretrain(shards)
    tokens = torch.cat([batch.tokens for batch in module.train_dataloader()])
    narrations = {tuple(row[row > 0].tolist())[2] for row in tokens}  # opens, pulls
    assert len(narrations) == 2


def test_evaluation_sees_each_clip_and_sentence_once(shards, records):
    clips, sentences = retrieval(shards).val_dataloader()
    batches = list(clips)
    assert len(batches) == len(clips) == 7  # 32 clips in batches of 5
    index = torch.cat([batch.clip_index[batch.mask] for batch in batches])
    assert index.tolist() == list(range(32))
    assert batches[-1].mask.tolist() == [True, True, False, False, False]
    assert batches[-1].clip_index[2:].tolist() == [-1] * 3
    rows = list(sentences)
    assert all(isinstance(row, TextBatch) for row in rows)
    index = torch.cat([row.text_index[row.mask] for row in rows])
    distinct = list(dict.fromkeys(record.texts[0] for record in records))
    assert index.tolist() == list(range(len(distinct)))


def test_mined_narrations_are_the_relevant_ones(records):
    sentences = [own_text(record) for record in records]
    sentences = [
        type(s)(s.text, i, s.verb_classes, s.noun_classes) for i, s in enumerate(sentences)
    ]
    relevance = relevance_matrix(
        torch.tensor([r.verb_classes for r in records]),
        torch.tensor([r.noun_classes for r in records]),
    )
    miner = NarrationMiner(sentences, 0.1)
    for row, record in enumerate(records):
        expected = (relevance[row] >= 0.1).nonzero().flatten().tolist()
        assert miner.candidates(record).tolist() == expected
    drawn = {miner(records[0], random.Random(k)).text_index for k in range(300)}
    assert drawn == set(miner.candidates(records[0]).tolist())
    with pytest.raises(ValueError, match="no narration with relevance"):
        miner(type(records[0])("x", "v", 0, 1, ("t",), (99,), (99,)), random.Random(0))


def test_retrieval_pairs_are_relevant_and_carry_the_texts_classes(shards):
    for batch in retrieval(shards).train_dataloader():
        relevance = relevance_matrix(
            batch.verb_classes,
            batch.noun_classes,
            batch.text_verb_classes,
            batch.text_noun_classes,
        )
        assert (relevance.diagonal() >= 0.1).all()


class Recorder(LightningModule):
    """Writes down which clips each training step saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.clip_index.tolist()))
        return self.weight * batch.video.float().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint at a step, at one of the places where Lightning lets one save."""

    def __init__(self, step: int, hook: str, path: Path):
        self.step, self.path = step, path
        setattr(self, hook, self._save)

    def _save(self, trainer, *_args, **_kwargs):
        if trainer.global_step >= self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(shards, tmp_path, callbacks=(), ckpt_path=None, max_epochs=3, module=None, **data):
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
    )
    module = module or pretrain(shards, val=RetrievalSplit(str(shards)), **data)
    trainer.fit(recorder, datamodule=module, ckpt_path=ckpt_path)
    return recorder.seen


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        (3, "on_train_batch_end"),
        (8, "on_train_batch_end"),  # the last batch of an epoch of 8
        (8, "on_validation_end"),
        (8, "on_train_epoch_end"),
        (13, "on_train_batch_end"),
        (13, "on_train_batch_start"),
    ],
)
def test_resumed_fit_sees_the_batches_of_an_uninterrupted_one(shards, tmp_path, step, hook):
    path = tmp_path / "saved.ckpt"
    whole = fit(shards, tmp_path, [SaveAt(step, hook, path)])
    assert len(whole) == 24
    assert fit(shards, tmp_path, ckpt_path=path, num_workers=1) == whole[step:]


def test_what_lightning_cannot_resume_is_refused(shards, tmp_path):
    """A checkpoint saved in on_train_epoch_start loses an epoch in Lightning itself."""
    path = tmp_path / "saved.ckpt"
    fit(shards, tmp_path, [SaveAt(8, "on_train_epoch_start", path)])
    with pytest.raises(ValueError, match=r"stream stands at .* \(1, 0\), the trainer at \(2, 0\)"):
        fit(shards, tmp_path, ckpt_path=path)


def test_another_stream_is_refused_unless_accepted(shards, tmp_path):
    module = pretrain(shards)
    state = module.state_dict()
    assert set(state) >= {"epoch", "samples", "seed", "manifest"}
    with pytest.raises(ValueError, match=r"seed 0 -> 1.*accept_changed_data"):
        pretrain(shards, seed=1).load_state_dict(state)
    pretrain(shards, seed=1, accept_changed_data=True).load_state_dict(state)
    changed = {**state, "manifest": "0" * 16}
    with pytest.raises(ValueError, match="manifest"):
        module.load_state_dict(changed)


def test_fingerprint_follows_the_content_not_the_place(shards, tmp_path):
    import shutil

    copy = shutil.copytree(shards, tmp_path / "copy")
    assert Manifest.load(copy).fingerprint == Manifest.load(shards).fingerprint


def test_decoding_on_a_gpu_in_form(shards, monkeypatch):
    """Frames are asked for on the device and come back to the host; without a device it is told."""
    asked = []

    class VideoDecoder:
        metadata = SimpleNamespace(begin_stream_seconds=0.0, end_stream_seconds=1.0, average_fps=10)

        def __init__(self, data, *, device, **options):
            asked.append(device)

        def get_frames_played_at(self, moments):
            return SimpleNamespace(data=torch.full((len(moments), 4, 6, 3), 7, dtype=torch.uint8))

    library = ModuleType("torchcodec.decoders")
    library.VideoDecoder = VideoDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", library)
    frames = decode_frames(b"", 2, decoder="torchcodec-cuda")
    assert asked == ["cuda"] and frames.shape == (2, 4, 6, 3) and frames[0, 0, 0, 0] == 7
    module = pretrain(shards, decoder="torchcodec-cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module._start_method() == "spawn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'torchcodec-cuda', and there is no CUDA device"):
        module.train_dataloader()
