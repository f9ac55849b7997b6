"""The card of a model, word for word: what is told of it, and what is kept back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_modules.checkpoints.conversion import LoadedModel
from lightning_modules.checkpoints.loading import LoadReport
from lightning_modules.checkpoints.sharing import model_card
from lightning_modules.checkpoints.source import CheckpointSource
from lightning_modules.models import DualEncoder, DualEncoderConfig, TextConfig, VisionConfig
from lightning_modules.training.run.checkpoint_store import Manifest

CONFIG = DualEncoderConfig(
    VisionConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_hidden=40),
    TextConfig(width=16, depth=2, num_heads=2),
    embed_dim=12,
)
RECIPE = """
trainer: {logger: {token: sesame}}
seed_everything: 7
model: {init_args: {weights: /home/me/data/w/x.pt, api_key: sesame, a_token: sesame, depth: 2}}
data:
  init_args:
    train: [/home/me/data/egoclip/manifest.json, {more: /home/me/ek100/manifest.json}]
    relative: w/x/y.pt
"""
TOP = """---
license: mit
library_name: eva02-at
pipeline_tag: feature-extraction
tags: [video, egocentric, video-text-retrieval, clip]
---
# lab/model

A dual encoder of clips and sentences (eva02, 16 px, patch 8, width 32, depth 2, 4 frames, \
time: both; embeddings of 12), written by `eva02-at convert` from `SOURCE`.

```console
$ eva02-at search --checkpoint hf:lab/model --videos DIR "a hand opens a drawer"
```

```python
from lightning_modules.models import DualEncoder

model = DualEncoder.from_pretrained("lab/model")
```
"""
BARE = """
## Figures

None was given.

## Data and recipe

The source came without its recipe.
"""
FULL = """
Assumed, since the source does not tell: a <b> & 'c'; d.

## Figures

| benchmark | protocol | figure | value [95 % interval] |
|---|---|---|---|
| ek100_mir | 4 frames | map.v2t | 50.00 |
| ek100_mir | 4 frames | map.avg | 49.50 |

Intervals: 1,000 resamplings of the queries. Made with `eva02-at evaluate --json`.

## Data and recipe

Trained on:

- `egoclip`
- `ek100`

<details><summary>The resolved recipe</summary>

```yaml
model:
  init_args:
    weights: '.../w/x.pt'
    depth: 2
data:
  init_args:
    train:
    - '.../egoclip/manifest.json'
    - more: '.../ek100/manifest.json'
    relative: w/x/y.pt
seed_everything: 7
```

</details>
"""


def loaded(name: str, folder: Path, config: str | None, **of_a_run: object) -> LoadedModel:
    manifest = Manifest(5, 0, 1, "plain", files=[]) if of_a_run else None
    described = None if config is None else folder / config
    source = CheckpointSource(folder / name, folder / name, manifest, described)
    return LoadedModel(DualEncoder(CONFIG), CONFIG, source, LoadReport(), **of_a_run)


@pytest.mark.parametrize("described", [None, "m.json"])
def test_of_a_file_little_is_told(tmp_path: Path, described: str | None) -> None:
    (tmp_path / "m.json").write_text('{"model": {"api_key": "sesame"}}')
    card = model_card("lab/model", loaded("m.safetensors", tmp_path, described), "mit")
    assert card == TOP.replace("SOURCE", "m.safetensors") + BARE


def test_of_a_run_all_is_told_but_secrets_and_places(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(RECIPE)
    result = tmp_path / "r.json"
    figures = {"map": {"v2t": 50.0, "avg": 49.5}}
    result.write_text(json.dumps({"benchmark": "ek100_mir", "protocol": "4 frames", **figures}))
    of_a_run = loaded("step-00000005", tmp_path, "config.yaml", assumed=["a <b> & 'c'", "d"])
    card = model_card("lab/model", of_a_run, "mit", [result])
    assert card == TOP.replace("`SOURCE`", "`step-00000005`, step 5") + FULL


@pytest.mark.parametrize("content", ["[1", "{}", "[]", '{"benchmark": "ek100_mir"}'])
def test_a_file_without_figures_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"r\.json is nothing that `evaluate --json` wrote \(\w+"):
        model_card("lab/model", loaded("m.safetensors", tmp_path, None), "mit", [path])
