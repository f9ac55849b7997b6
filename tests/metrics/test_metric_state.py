"""The metric classes: identities, collections, and real ranks that hold uneven shares."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from gloo_ranks import run_ranks
from torchmetrics import MetricCollection

from datamodules.relevance import relevance_matrix
from lightning_modules.metrics import (
    ActionAccuracy,
    CharadesMAP,
    EgoMCQAccuracy,
    MultiInstanceMAP,
    MultiInstanceNDCG,
    TextVideoRecall,
    benchmarks,
    multi_instance,
)
from lightning_modules.metrics.functional import multi_instance as functional_multi_instance
from lightning_modules.metrics.functional import multi_instance_map

NUM_VIDEOS, NUM_TEXTS = 23, 11


def samples():
    """Embeddings and class ids; the noun rows have ragged widths."""
    draw = torch.Generator().manual_seed(0)
    result = {}
    for modality, size in (("video", NUM_VIDEOS), ("text", NUM_TEXTS)):
        nouns = torch.randint(5, (size, 3), generator=draw)
        nouns[torch.rand(size, 3, generator=draw) < 0.4] = -1
        result[modality] = (
            F.normalize(torch.randn(size, 6, generator=draw), dim=1),
            torch.arange(size) * 3 + 100,
            torch.randint(3, (size, 1), generator=draw),
            nouns,
        )
    return result


def feed(metric, rows: dict[str, list[int]], batch: int = 4) -> None:
    """Give a metric the chosen rows in batches, each batch's nouns cut to its widest row."""
    for modality, tensors in samples().items():
        chosen = rows[modality]
        for start in range(0, len(chosen), batch):
            embeddings, index, verbs, nouns = (t[chosen[start : start + batch]] for t in tensors)
            used = (nouns >= 0).any(0)
            width = int(used.nonzero().max()) + 1 if used.any() else 1
            metric.update(embeddings, index, verbs, nouns[:, :width], modality=modality)


def everything() -> dict[str, list[int]]:
    return {"video": list(range(NUM_VIDEOS)), "text": list(range(NUM_TEXTS))}


def all_metrics(rank: int, num_ranks: int) -> dict:
    """What every metric says after each rank saw its share, one rank possibly nothing."""
    shares = num_ranks - 1 if num_ranks == 3 else num_ranks  # of three ranks the last sees nothing

    def share(size: int) -> list[int]:
        own = list(range(rank, size, shares)) if rank < shares else []
        return own + own[:1]  # a sampler's padding: one sample twice

    collection = MetricCollection({"map": MultiInstanceMAP(), "ndcg": MultiInstanceNDCG()})
    if rank < shares:
        feed(collection, {"video": share(NUM_VIDEOS), "text": share(NUM_TEXTS)})
    result = {
        f"{name}_{key}": value.item()
        for name, metric in collection.items(keep_base=True, copy_state=False)
        for key, value in metric.compute().items()
    }
    draw = torch.Generator().manual_seed(1)
    scores, targets = torch.rand(13, 4, generator=draw), torch.rand(13, 4, generator=draw) < 0.3
    own, index = share(13), torch.arange(13)
    metrics = {
        "mcq": EgoMCQAccuracy(),
        "charades": CharadesMAP(),
        "actions": ActionAccuracy(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 2])),
        "recall": TextVideoRecall(),
    }
    if own:
        metrics["mcq"].update(scores[own], index[own] % 4, index[own] % 2 + 1, index[own])
        metrics["charades"].update(scores[own], targets[own], index[own])
        metrics["actions"].update(scores[own], index[own] % 4, index[own])
        metrics["recall"].update(scores[own], index[own])
        metrics["recall"].update(scores[own].flip(1), index[own], video=index[own] // 2)
    for name, metric in metrics.items():
        result |= {f"{name}_{key}": float(value) for key, value in metric.compute().items()}
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_give_the_result_of_one_process(num_ranks):
    expected = all_metrics(0, 1)
    assert expected["map_avg"] > 0
    for result in run_ranks(num_ranks, all_metrics, num_ranks):
        assert result == expected  # to the last bit: the samples are put in the order of their ids


def test_matches_the_function_on_the_whole_matrix():
    metric = MultiInstanceMAP()
    feed(metric, everything())
    (video, _, *video_classes), (text, _, *text_classes) = samples().values()
    relevance = relevance_matrix(*video_classes, *text_classes)
    v2t, t2v = (100 * value for value in multi_instance_map(video @ text.T, relevance))
    result = metric.compute()
    # the function was given float32 relevance: thirds are off by 3e-8
    torch.testing.assert_close(result["v2t"], v2t, rtol=1e-7, atol=0)
    torch.testing.assert_close(result["t2v"], t2v, rtol=1e-7, atol=0)
    torch.testing.assert_close(result["avg"], (v2t + t2v) / 2, rtol=1e-7, atol=0)


def test_order_and_repetition_do_not_matter():
    straight, shuffled = MultiInstanceMAP(), MultiInstanceMAP()
    feed(straight, everything())
    mixed = everything()
    mixed["video"] = [*mixed["video"][::-1], 4, 4, 7]
    mixed["text"] = mixed["text"][5:] + mixed["text"]
    feed(shuffled, mixed, batch=5)
    assert straight.compute() == shuffled.compute()


def test_masked_rows_do_not_count():
    plain, padded = MultiInstanceNDCG(), MultiInstanceNDCG()
    feed(plain, everything())
    for modality, (embeddings, index, verbs, nouns) in samples().items():
        mask = torch.ones(len(index) + 2, dtype=torch.bool)
        mask[-2:] = False
        grown = [torch.cat([t, t[:2]]) for t in (embeddings, index + 0, verbs, nouns)]
        grown[1][-2:] = -5
        padded.update(*grown, modality=modality, mask=mask)
    assert plain.compute() == padded.compute()


def test_a_collection_keeps_one_state():
    collection = MetricCollection({"map": MultiInstanceMAP(), "ndcg": MultiInstanceNDCG()})
    feed(collection, everything())
    assert collection.compute_groups == {0: ["map", "ndcg"]}
    first, second = (m for _, m in collection.items(keep_base=True, copy_state=False))
    assert first.video_embeddings is second.video_embeddings
    assert set(collection.compute()) == {
        f"{name}_{key}" for name in ("map", "ndcg") for key in ("v2t", "t2v", "avg")
    }
    collection.reset()
    assert first.video_embeddings == []


def test_half_precision_embeddings_are_kept_as_float32():
    metric = MultiInstanceMAP()
    ids = torch.zeros(2, 1, dtype=torch.int64)
    metric.update(torch.eye(2, dtype=torch.bfloat16), torch.arange(2), ids, ids, "video")
    assert metric.video_embeddings[0].dtype == torch.float32


def test_bad_updates_are_refused():
    metric, ids = MultiInstanceMAP(), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="modality 'audio'"):
        metric.update(torch.eye(2), torch.arange(2), ids, ids, "audio")
    with pytest.raises(ValueError, match="all must have B rows"):
        metric.update(torch.eye(2), torch.arange(3), ids, ids, "video")
    metric.update(torch.eye(2), torch.arange(2), ids, ids, "video")
    with pytest.raises(ValueError, match="at least one of each"):
        metric.compute()


@pytest.mark.parametrize("module", [multi_instance, benchmarks, functional_multi_instance])
def test_examples_of_docstrings(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
