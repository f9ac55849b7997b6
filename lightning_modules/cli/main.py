"""`eva02-at`: one console script, one module a command."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_modules.cli.endings import EXIT_FAULT, EXIT_OK, EXIT_USER_ERROR, exit_code, report
from lightning_modules.cli.startup import importing
from lightning_modules.packaged import version
from lightning_modules.training.run.signals import STOP

# command -> (module with `main(argv) -> exit code`, one-line help). Modules are imported only
# when their command runs, so that `--help` and small commands start at once.
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("lightning_modules.cli.train", "train a recipe: --config FILE [--key.sub=value ...]"),
    "validate": ("lightning_modules.cli.train", "run the validation loop of a recipe"),
    "test": ("lightning_modules.cli.train", "run the test loop of a recipe"),
    "predict": ("lightning_modules.cli.train", "write the embeddings of a recipe's test data"),
    "shards": ("lightning_modules.cli.shards", "build, verify or describe WebDataset shards"),
    "score": ("lightning_modules.cli.score", "EK-100 MIR mAP and nDCG of a similarity matrix"),
    "audit": ("lightning_modules.cli.audit", "what a retrieval figure is worth: oracle, leaks"),
    "tune": ("lightning_modules.cli.tune", "weights of an ensemble, on held-out training clips"),
    "evaluate": ("lightning_modules.cli.evaluate", "one checkpoint on one benchmark"),
    "convert": ("lightning_modules.cli.convert", "any supported checkpoint to a safetensors file"),
    "embed": ("lightning_modules.cli.embed", "embeddings of one's own videos"),
    "sweep": ("lightning_modules.cli.sweep", "checkpoints x benchmarks, then one table"),
    "search": ("lightning_modules.cli.search", "find the moments of one's videos by a text"),
    "recipes": ("lightning_modules.cli.recipes", "list, show or copy the packaged recipes"),
    "runs": ("lightning_modules.cli.runs", "the runs below a folder: state, step, speed, owner"),
    "zoo": ("lightning_modules.cli.zoo", "public checkpoints: where, licence, reported figures"),
    "submit": ("lightning_modules.cli.submit", "check a recipe's SLURM job, then queue it"),
    "doctor": ("lightning_modules.cli.doctor", "would a training job run here, and run fast"),
    "plan": ("lightning_modules.cli.plan", "memory, time and cost of a recipe on a cluster"),
    "demo": ("lightning_modules.cli.demo", "the whole mission in small, on videos made here"),
    "bench": ("lightning_modules.cli.bench", "ratios against the obvious alternative"),
}
_TRAINER_VERBS = ("fit", "validate", "test", "predict")


def _usage() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    return f"usage: eva02-at COMMAND [options]\n\n{rows}\n\n`eva02-at COMMAND --help` says more."


def _refuse_foreign_kernels() -> None:
    """PyPI's distribution `kernels` (Hugging Face's) may have taken our package of that name.

    It may also be installed and harmless: behind ours on the path, or overwritten by it. Only
    what `import kernels` finds counts, and it is read, not run.
    """
    found = importlib.util.find_spec("kernels")
    origin = Path(found.origin) if found is not None and found.origin else None
    if origin is not None and "EVA02-AT" in origin.read_text().partition("\n")[0]:
        return
    raise ValueError(
        f"`import kernels` finds {origin or 'nothing'}, not this project's package: another "
        "distribution of that name (Hugging Face's `kernels`, say) shadows it or has overwritten "
        "it. Use an environment without it; or `pip uninstall kernels` and then, since pip takes "
        "shared files away with it, `pip install --force-reinstall --no-deps` what you installed "
        "this project from."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after `eva02-at`; the process's own by default.

    Returns:
        The exit code: 0 done; 2 the user's mistake; 85 stopped by a signal with a complete
        checkpoint; 75 a fault of the machine; anything else a fault.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _refuse_foreign_kernels()
        if not words or words[0] in ("-h", "--help", "help"):
            print(_usage())
            return EXIT_OK if words else EXIT_USER_ERROR
        if words[0] == "--version":
            print(version())
            return EXIT_OK
        command, rest = words[0], words[1:]
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}; one of: {', '.join(COMMANDS)}")
        if command == "fit":
            STOP.install()  # before the imports that take seconds
        with importing():
            module = importlib.import_module(COMMANDS[command][0])
        run: Callable[[list[str]], int] = module.main
        return run([command, *rest] if command in _TRAINER_VERBS else rest)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as `| head` does
        return EXIT_OK
    except Exception as error:
        code = exit_code(error, words)
        if code == EXIT_FAULT or os.environ.get("EVA02_AT_TRACEBACK"):
            traceback.print_exc()
        if code != EXIT_FAULT:
            report(error, code)
        return code


if __name__ == "__main__":
    sys.exit(main())
