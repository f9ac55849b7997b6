"""A batch goes to the device beside the computation: in form here, for real on a GPU."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from datamodules.batch import ClipBatch
from lightning_modules.losses import InfoNCELoss
from lightning_modules.models import ModelConfig
from lightning_modules.pretrain import PretrainModule
from lightning_modules.side_stream import SideStream
from lightning_modules.training.optim.optimizers import OptimizerConfig


def batch() -> ClipBatch:
    names = [f.name for f in fields(ClipBatch) if f.type == "Tensor"]
    numbers = {name: torch.arange(6).view(2, 3) + i for i, name in enumerate(names)}
    return ClipBatch(**numbers, keys=["a", "b"])


def tensors(batch: ClipBatch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


def module() -> PretrainModule:
    return PretrainModule(ModelConfig("eva02_at_tiny"), InfoNCELoss(), OptimizerConfig())


def test_on_a_cpu_nothing_is_streamed() -> None:
    host = batch()
    moved = module().transfer_batch_to_device(host, torch.device("cpu"), 0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(moved), tensors(host), strict=True))


def test_copies_are_issued_beside_and_waited_for_by_the_computation(monkeypatch) -> None:
    """The order of calls to torch.cuda, the copies themselves going to the meta device."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            calls.append("made")

        def wait_stream(self, other: object) -> None:
            calls.append("computation waits")

    @contextmanager
    def beside(stream: object):
        calls.append("beside")
        yield
        calls.append("back")

    computing = Stream.__new__(Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    recorded: list[object] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(stream))
    side, host = SideStream(), batch()

    def move() -> ClipBatch:
        calls.append("copies")
        return apply_to_collection(host, Tensor, lambda tensor: tensor.to("meta"))

    for _ in range(2):
        moved = side.copy(torch.device("cuda"), move)
    step = ["beside", "copies", "back", "computation waits"]
    assert calls == ["made", *step, *step]
    assert recorded == [computing] * (2 * len(tensors(moved)))
    assert copy.deepcopy(side)._stream is None  # of a module that is copied
    assert moved.keys == host.keys and moved.video.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_arrive_while_the_device_computes() -> None:
    device, side = torch.device("cuda"), SideStream()
    host = torch.randint(0, 256, (64, 3, 4, 224, 224), dtype=torch.uint8).pin_memory()
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy.t()
        moved = side.copy(device, lambda: host.to(device, non_blocking=True))
        assert torch.equal(moved.cpu(), host)
        del moved
