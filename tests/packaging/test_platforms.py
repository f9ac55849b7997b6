"""The dependencies resolve, from wheels alone, on every platform and Python that is promised.

Nothing is installed: uv asks the package index what there is. Offline the tests are skipped.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
# DeepSpeed alone is published as source, without compiled parts; it is built where it is installed.
ONLY_WHEELS = ("--only-binary", ":all:", "--no-binary", "deepspeed")
OFFLINE = re.compile(r"error sending request|Failed to fetch|dns error|Could not connect", re.I)


def resolve(python: str, machine: str, requirements: Path) -> dict[str, str]:
    """Distribution -> version, as pip would install on that machine."""
    words = ["pip", "compile", "--quiet", "--no-header", "--no-annotate", *ONLY_WHEELS]
    words += ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_28"]
    done = subprocess.run(
        [find_uv_bin(), *words, str(requirements)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode and OFFLINE.search(done.stderr):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in done.stdout.split() if "==" in line)


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_dependencies_resolve(python: str, machine: str) -> None:
    found = resolve(python, machine, ROOT / "pyproject.toml")
    assert ("decord" in found) == ("xformers" in found) == (machine == "x86_64")
    assert "decord2" not in found  # the same name in Python, and no match for it
    assert {"torch", "deepspeed", "av", "lightning"} <= set(found)


@pytest.mark.slow
def test_a_package_without_a_wheel_is_seen(tmp_path: Path) -> None:
    """What the test above would say of the marker it guards."""
    requirements = tmp_path / "requirements.in"
    requirements.write_text("decord==0.6.0\n")
    assert resolve("3.11", "x86_64", requirements)["decord"] == "0.6.0"
    with pytest.raises(AssertionError, match="no wheels"):
        resolve("3.11", "aarch64", requirements)
