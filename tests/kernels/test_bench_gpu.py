"""`make gpu` without a GPU: it says so; and its machinery, on parts that are real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.bench import gpu
from lightning_modules.cli.bench import main as bench
from lightning_modules.cli.main import main

ROOT = Path(__file__).parents[2]
WORKS = "import json, sys; json.dump({'rows': [{'group': 'g', 'name': 'n', 'median_s': 0.5, "
WORKS += "'ratio': 2.0, 'notes': {'pairs/s': 7}}]}, open(sys.argv[1], 'w')); print('done')"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    with pytest.raises(ValueError, match="no CUDA device here, so nothing was run"):
        bench(["gpu"])
    words = ["make", "gpu", f"GPU_PYTHON={sys.executable}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "no CUDA device here" in done.stderr


def test_what_fails_or_hangs_costs_its_own_row(tmp_path: Path) -> None:
    listed = [
        gpu.Part("works", ("-c", WORKS, "{json}"), 60),
        gpu.Part("fails", ("-c", "raise SystemExit('out of memory')"), 60),
        gpu.Part("hangs", ("-c", "import time; print('here', flush=True); time.sleep(99)"), 2),
    ]
    outcomes = [*gpu.run_parts(listed), *gpu.run_parts(listed[:1], total_s=0)]
    assert [o.code for o in outcomes] == [0, 1, None, None]
    page = gpu.write(outcomes, "NVIDIA Test 80GB (rev. 2)", tmp_path)
    assert page.name == "nvidia-test-80gb-rev-2.md"
    text = page.read_text()
    assert "| g | n | 500.00 | 2.00x |  | pairs/s 7 |" in text
    assert outcomes[2].seconds >= 2  # more on a busy machine
    assert f"| hangs | past its limit | {outcomes[2].seconds:.0f} |" in text
    assert "out of memory" in text and "here" in text and "no time was left" in text
    assert len(json.loads(page.with_suffix(".json").read_text())["parts"]) == 4


def test_its_demo_runs_to_the_report(tmp_path: Path) -> None:
    """With fewer steps than are logged at once, and a warm-up that is shorter than the run."""
    out = tmp_path / "demo"
    words = [word.replace("{out}", str(out)) for word in gpu.DEMO]
    assert main([*words, "--trainer.accelerator=cpu"]) == 0
    page = (out / "report.html").read_text()
    assert page.count("The log has no values.") == 1  # the fine-tuning's four steps
    assert not (out / "fine_tune" / "logs" / "metrics.csv").exists()
    assert json.loads((out / "metrics.json").read_text())["clips_per_second"]["fine_tune"] > 0


def test_every_part_is_a_command_that_there_is() -> None:
    """Each runs here up to its own help, and all of them fit into the time."""
    listed = gpu.parts({"eva02_at_base_16": 128, "eva02_at_large_14": 32})
    assert len({part.name for part in listed}) == len(listed) == 9
    for part in listed:
        if "bench" in part.words:
            name, *options = part.words[part.words.index("bench") + 1 :]
            module = __import__(f"lightning_modules.bench.{name}", fromlist=["main"])
            with pytest.raises((SystemExit, ValueError)) as stopped:
                module.main([*options, "--no-such-option"])
            assert "no-such-option" in str(stopped.value) or stopped.value.code == 2
