"""Clips that nobody watches, as `evaluate` reads them, decode in any number of workers."""

from __future__ import annotations

import math

from torch.utils.data import DataLoader, Dataset

from datamodules.stream.hung import DecodeWatch


class _Samples(Dataset):
    def __init__(self) -> None:
        self.watch = DecodeWatch(0, math.inf)  # what a data set without a watch has

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        with self.watch.decoding(0, index):
            return index


def test_every_worker_decodes() -> None:
    found = [int(index) for index in DataLoader(_Samples(), batch_size=None, num_workers=3)]
    assert found == list(range(6))
