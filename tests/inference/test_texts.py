"""`eva02-at embed --texts`: what the heads for language queries read, read as they read it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from published_layouts import EVA, random_model

from datamodules.tokenizer import Tokenizer
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.cli.main import main
from lightning_modules.models import DualEncoder

TEXTS = ["Where did I put the keys?", "What did I pour into the cup, the first time I was there?"]
TOLERANCE = 1e-5  # fp32, sums of another order


@pytest.fixture
def model(tmp_path: Path) -> DualEncoder:
    made = random_model(EVA)
    torch.save(made.state_dict(), tmp_path / "m.pt")
    (tmp_path / "m.json").write_text(config_to_json(EVA))
    return made


def embed(folder: Path, texts: Path, output: str, *words: str) -> int:
    model = ["--checkpoint", str(folder / "m.pt"), "--config", str(folder / "m.json")]
    return main(["embed", *model, "--texts", str(texts), "--output", str(folder / output), *words])


@pytest.fixture
def ego4d(tmp_path: Path) -> Path:
    """Ego4D's nesting, with the empty query that the published files have."""
    queries = [{"query": TEXTS[0]}, {"template": "x"}, {"query": TEXTS[1]}, {"query": None}]
    annotation = {"annotation_uid": "uid", "language_queries": queries}
    path = tmp_path / "nlq_val.json"
    path.write_text(json.dumps({"videos": [{"clips": [{"annotations": [annotation]}]}]}))
    return path


def pooled(model: DualEncoder, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return model.encode_text(Tokenizer(77)([text]))[0]


def states(model: DualEncoder, text: str) -> torch.Tensor:
    """Token k from the sentence cut after it: the tower is causal, so that nothing later counts."""
    ids = Tokenizer(77)([text])[0]
    length = int(ids.argmax()) + 1
    rows = []
    with torch.inference_mode():
        for end in range(1, length + 1):
            x = model.text.token_embedding(ids[None, :end]) + model.text.positional_embedding[:end]
            last = torch.tensor([end - 1])
            rows.append(model.text.norm(model.text.blocks(x, None, last))[0])
    return torch.stack(rows)


def close(found: object, expected: torch.Tensor) -> bool:
    return torch.allclose(torch.as_tensor(found), expected, rtol=0, atol=TOLERANCE)


def test_lmdb_as_groundnlq_and_osgnet_read_it(tmp_path: Path, model, ego4d: Path) -> None:
    assert embed(tmp_path, ego4d, "text.lmdb", "--per-token") == 0
    environment = lmdb.open(str(tmp_path / "text.lmdb"), readonly=True, create=False)
    with environment.begin(buffers=True) as transaction:
        assert transaction.stat()["entries"] == 2
        for key, text in (("uid_0", TEXTS[0]), ("uid_2", TEXTS[1])):
            with io.BytesIO(transaction.get(key.encode())) as reader:
                dump = np.load(reader, allow_pickle=True)
                assert close(dump["token_features"], states(model, text))
                assert close(dump["features"], pooled(model, text))
                assert dump["token_features"].dtype == np.float32


@pytest.mark.parametrize("per_token", [True, False])
def test_the_dict_that_egovlp_leaves(tmp_path: Path, model, ego4d: Path, per_token: bool) -> None:
    words = ["--per-token"] if per_token else []
    assert embed(tmp_path, ego4d, "sentence.npy", *words) == 0
    found = np.load(tmp_path / "sentence.npy", allow_pickle=True).item()
    assert set(found) == set(TEXTS)
    for text in TEXTS:
        expected = states(model, text)[1:-1] if per_token else pooled(model, text)[None]
        assert close(found[text], expected)


def test_plain_files(tmp_path: Path, model) -> None:
    rows = tmp_path / "queries.jsonl"
    lines = [json.dumps({"query_id": f"q{k}", "query": text}) for k, text in enumerate(TEXTS)]
    rows.write_text("\n".join(lines) + "\n")
    assert embed(tmp_path, rows, "a.npy", "--template", "#C C {}") == 0
    assert json.loads((tmp_path / "a.json").read_text()) == {"ids": ["q0", "q1"], "texts": TEXTS}
    for row, text in zip(np.load(tmp_path / "a.npy"), TEXTS, strict=True):
        assert close(row, pooled(model, f"#C C {text}"))
    assert embed(tmp_path, rows, "b.pt", "--per-token") == 0
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert close(found["q1"], states(model, TEXTS[1]))


@pytest.mark.parametrize(
    ("name", "content", "output", "words", "told"),
    [
        ("a.csv", "x", "o.npy", [], ".txt, .jsonl, .json"),
        ("a.txt", " \n", "o.npy", [], "no sentence"),
        ("a.json", "{}", "o.npy", [], "no .json of queries"),
        (
            "a.jsonl",
            '{"query_id": 1, "query": "a"}\n{"query_id": 1, "query": "b"}',
            "o.pt",
            [],
            "two",
        ),
        ("a.txt", "a", "o.npy", ["--per-token"], "FILE.pt, FOLDER.lmdb"),
        ("a.txt", "a", "o.csv", [], "must end in"),
        ("a.txt", "a", "o.npy", ["--videos", "v"], "one of them"),
        ("a.txt", "a", "o.npy", ["--template", "x"], "no {}"),
    ],
)
def test_mistakes(tmp_path: Path, model, capsys, name, content, output, words, told) -> None:
    (tmp_path / name).write_text(content)
    assert embed(tmp_path, tmp_path / name, output, *words) == 2
    assert told in capsys.readouterr().err
