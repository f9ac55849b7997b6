"""Forty wrong uses of the commands that are not `fit`'s, and the page that lists what they answer.

python tests/wrong_uses.py --write docs/commands.md    runs each in a process of its own
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from epic_files import write_retrieval_split

SCORE = "score --annotations epic --similarity"
EVALUATE = "evaluate --checkpoint m.pt --shards s --benchmark"
BUILD = "shards build --output out"
# as a user types them, in the folder that `prepare` makes; the last word is the exit code
USES = (
    "trian --config x.yaml",
    "shards biuld",
    f"{BUILD} --format ek100",
    f"{BUILD} --format ek1000 --annotations epic/EPIC_100_retrieval_test.csv --videos videos",
    f"{BUILD} --format ek100 --annotations absent.csv --videos videos",
    f"{BUILD} --format ek100 --annotations notes.txt --videos videos",
    f"{BUILD} --format csv --annotations notes.txt --videos videos --columns nonsense",
    f"{BUILD} --format ek100 --annotations epic/EPIC_100_retrieval_test.csv --videos videos "
    "--layout attic",
    f"{BUILD} --format ek100 --annotations epic/EPIC_100_retrieval_test.csv --videos videos "
    "--part 3/2",
    "shards verify absent",
    "shards info notes.txt",
    "shards browse absent --html page.html",
    "shards browse absent --html page.html --samples 0",
    f"{SCORE} absent.npy",
    f"{SCORE} small.npy",
    f"{SCORE} notes.txt",
    f"{SCORE} right.npy --split tset",
    f"{SCORE} right.npy --max-missing 3",
    f"{SCORE} right.npy --weights 1 2",
    "score --annotations absent --similarity right.npy",
    "audit --annotations epic --shards s",
    "audit --annotations epic --similarity small.npy",
    "tune --annotations epic --split test --similarity right.npy --output t.json",
    "tune --annotations epic --similarity right.npy --output t.json --objective loss",
    f"{EVALUATE} ek100_mirr",
    f"{EVALUATE} ek100_mir",
    "evaluate --zoo no_such --shards s --benchmark egomcq",
    "evaluate --shards s --benchmark egomcq",
    f"{EVALUATE} egomcq --submission x.zip",
    "convert --input absent.pt --output m.safetensors",
    "convert --input notes.txt --output m.safetensors",
    "convert --input m.pt --output m.safetensors --push me/model",
    "embed --checkpoint absent.pt --videos videos",
    "embed --checkpoint absent.pt --output f.pt",
    "embed --checkpoint absent.pt --texts notes.txt --template plain --output f.npy",
    "search --videos absent --checkpoint m.pt",
    "search --videos videos --checkpoint m.pt --top 0 fridge",
    "search --videos videos --checkpoint m.pt --html page.html",
    "sweep --checkpoints absent --benchmark ek100_mir --output out",
    "sweep table absent",
    "runs videos",
    "recipes show mir/eva03",
    "recipes copy",
    "zoo eva03",
    "plan --config absent",
    "plan",
    "plan --config demo/pretrain --cluster.gpus_per_nod 8",
    "plan --config demo/pretrain --cluster.gpus_per_node many",
    "submit --nodes 2",
    "submit --config demo/pretrain --nodes two",
    "submit --config demo/pretrain --gpus-per-node 0 --time tomorrow",
    "doctor --preset eva03",
    "doctor --folder absent",
    "bench kernel",
)
BEGIN, END = "<!-- begin: wrong uses -->", "<!-- end: wrong uses -->"


def prepare(folder: Path) -> None:
    """What the uses are wrong about."""
    (folder / "epic").mkdir()
    (folder / "videos").mkdir()
    for split in ("train", "test"):
        write_retrieval_split(folder / "epic", split, 30, 12)
    np.save(folder / "right.npy", np.zeros((30, 12), dtype=np.float32))
    np.save(folder / "small.npy", np.zeros((3, 2), dtype=np.float32))
    (folder / "notes.txt").write_text("to do: sleep\n")
    (folder / "m.pt").write_bytes(b"no checkpoint")


def told(error: str) -> str:
    """The last line of the error stream without what is in front of every message."""
    lines = error.strip().splitlines()
    return lines[-1].removeprefix("eva02-at: error: ") if lines else ""


def row(use: str, message: str, code: int) -> str:
    """The page's row, without the seconds."""
    message = message.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return f"| `eva02-at {use}` | {message} | {code} |"


def timed(use: str, folder: Path) -> str:
    """The page's row of a use that is run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "lightning_modules.cli.main", *shlex.split(use)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    message = told(done.stderr).replace(f"{folder.resolve()}/", "")
    return f"{row(use, message, done.returncode)} {seconds:.1f} |"


def main() -> None:
    """Write the table between the page's marks."""
    page = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        rows = [timed(use, Path(name)) for use in USES]
    head = "| use | answer | exit code | seconds |\n|---|---|---|---|"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text("\n".join([f"{before}{BEGIN}", head, *rows, f"{END}{after}"]))


if __name__ == "__main__":
    main()
