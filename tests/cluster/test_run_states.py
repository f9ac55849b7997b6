"""Random lives of a run against one that nobody touched: states and ways as in docs/resume.md.

`EVA02_AT_LIVES` sets the number of lives; `pytest -m slow` does 200.
"""

import csv
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from cluster_runs import run
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_run import STEPS_PER_EPOCH, steps

from lightning_modules.checkpoints.source import find_checkpoint

EPOCHS = 3
TOTAL = EPOCHS * STEPS_PER_EPOCH
CONSTANT = {"optimizer": {"schedule": "constant"}, "csv": True}
AHEAD = st.integers(1, 6)  # steps from where the run stands
SHARED = {}  # the zygote, the untouched run's folder, and figures of its checkpoints


def rows(folder):
    """(step, name, value) as logged."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [
            (int(row["step"]), name, float(row[name]))
            for row in csv.DictReader(file)
            for name in ("train/loss", "val/map_avg")
            if row.get(name)
        ]


def contents(folder):
    """Every file but what a run says, what a verb is to leave, and the owner's heartbeat."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".txt" and ".owner" not in path.parts
        if not path.name.startswith("test")
    }


def figure_of(folder, **options):
    """What `test` says of a run's checkpoint: its step, and the figure.

    None if it refuses: the contents of the newest are not what was written.
    """
    for path in (*folder.glob("test*"), folder / "log.txt"):
        path.unlink(missing_ok=True)
    done = run(SHARED["zygote"], folder, world=1, verb="test", **options)
    if done.codes != [0]:
        assert "the contents of state have changed" in done.text()
        assert not list(folder.glob("test*")), done.text()
        return None
    told = json.loads((folder / "test.json").read_text())
    return told["weights"]["step"], told["test/map_avg"]


class RunLife(RuleBasedStateMachine):
    """One run's folder, what has been done to it, and what must be true of it."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp(prefix="life-"))
        self.damaged = set()  # names of checkpoints
        self.fits = 0  # each has a configuration of its own
        self.exact = True  # until another number of ranks sums in another order
        self.cut_short = set()  # steps after which an early stop validated

    def teardown(self):
        if hasattr(self, "folder"):
            self.fit(1)
            self.end_is_the_oracles()
            shutil.rmtree(self.folder)

    # -- what is known of it --------------------------------------------------------------------
    def complete(self):
        found = {path.parent.name for path in self.folder.glob("checkpoints/step-*/manifest.json")}
        return sorted(found - self.damaged)

    @property
    def at(self):
        names = self.complete()
        return int(names[-1].removeprefix("step-")) if names else 0

    def fit(self, world, meanwhile=None, **options):
        """Run `fit`; whatever ends it, it begins where the newest whole checkpoint stands."""
        self.fits += 1
        begins = self.at
        seen = len(steps(self.folder)) if (self.folder / "steps-0.jsonl").exists() else 0
        options = {**CONSTANT, "epochs": EPOCHS, "recipe": f"fit: {self.fits}\n", **options}
        self.exact &= world == 1
        options |= {"world": world, "strategy": "ddp"}
        done = run(SHARED["zygote"], self.folder, meanwhile=meanwhile, **options)
        new = steps(self.folder)[seen:] if (self.folder / "steps-0.jsonl").exists() else []
        if new:
            assert new[0]["step"] == begins, done.text()
            assert [line["step"] for line in new] == list(range(begins, begins + len(new)))
            config = (self.folder / "config.yaml").read_text()
            assert config == f"fit: {self.fits}\n", "the configuration is that of the last training"
        for path in self.folder.glob("checkpoints/step-*/manifest.json"):
            name, config = path.parent.name, path.parent / "config.yaml"
            if int(name.removeprefix("step-")) > begins:
                if config.is_file() and config.read_text() == f"fit: {self.fits}\n":
                    self.damaged.discard(name)  # written anew
                assert name in self.damaged or new, name
                assert name in self.damaged or config.read_text() == f"fit: {self.fits}\n"
        self.last = done
        return done

    # -- what is done to it ---------------------------------------------------------------------
    @rule(ahead=AHEAD, world=st.sampled_from([1, 1, 2]), every=st.integers(1, 3))
    def stop_after_max_steps(self, ahead, world, every):
        due = min(self.at + ahead, TOTAL)
        options = {"trainer_options": {"max_steps": due}, "checkpoints": {"every_n_steps": every}}
        assert set(self.fit(world, **options).codes) == {0}, self.last.text()
        assert self.at == due

    @precondition(lambda self: self.at < TOTAL)
    @rule(epochs=st.integers(1, EPOCHS))
    def stop_after_max_epochs(self, epochs):
        epochs = max(epochs, -(-self.at // STEPS_PER_EPOCH))
        assert self.fit(1, epochs=epochs).codes == [0], self.last.text()
        assert self.at == max(self.at, epochs * STEPS_PER_EPOCH)

    @rule(ahead=AHEAD)
    def stop_early(self, ahead):
        due = min(self.at + ahead, TOTAL)
        self.cut_short.add(due - 1)
        trouble = {"at": due, "where": "should_stop"}
        assert self.fit(1, trouble=trouble).codes == [0], self.last.text()
        assert self.at == due

    @precondition(lambda self: self.at < TOTAL)
    @rule(
        ahead=AHEAD,
        signum=st.sampled_from([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]),
        world=st.sampled_from([1, 1, 2]),
    )
    def stop_by_a_signal(self, ahead, signum, world):
        strikes = min(self.at + ahead, TOTAL) - 1
        self.fit(world, trouble={"at": strikes, "rank": world - 1, "signum": signum})
        assert set(self.last.codes) == {85}, self.last.text()
        assert self.at == strikes + 1

    @rule(signum=st.sampled_from([signal.SIGTERM, signal.SIGKILL]))
    def stop_in_a_validation(self, signum):
        begins = self.at
        due = min((begins // STEPS_PER_EPOCH + 1) * STEPS_PER_EPOCH, TOTAL)
        self.fit(1, trouble={"at": due, "where": "validation", "signum": signum})
        if begins < TOTAL:
            assert self.last.codes == [85 if signum == signal.SIGTERM else -9], self.last.text()

    @rule(ahead=AHEAD, where=st.sampled_from(["train", "save"]))
    def kill(self, ahead, where):
        at = min(self.at + ahead, TOTAL) - (where == "train")
        self.fit(1, trouble={"at": at, "where": where, "signum": signal.SIGKILL})

    @rule(
        ahead=AHEAD,
        call=st.sampled_from(
            ["saving.file_record", "saving.CheckpointFolder.commit", "saving.HostMemory.copy"]
        ),
        world=st.sampled_from([1, 2]),
    )
    def a_disk_fails_once(self, ahead, call, world):
        due = min(self.at + ahead, TOTAL)
        trouble = {"at": due, "where": f"call:{call}"}
        options = {"trouble": trouble, "trainer_options": {"max_steps": min(due + 2, TOTAL)}}
        assert set(self.fit(world, **options).codes) == {0}, self.last.text()

    @precondition(lambda self: self.at < TOTAL)
    @rule(ahead=AHEAD, worlds=st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    def a_second_run_comes(self, ahead, worlds):
        """While one trains, another is refused and changes nothing."""
        held, go = self.folder / "held", self.folder / "go"

        def meanwhile(first):
            while not held.exists():
                assert not first.ended(), first.text()
                time.sleep(0.01)
            before = contents(self.folder)
            options = {**CONSTANT, "recipe": "second: run\n", "folder": str(self.folder)}
            log = self.folder / "second.txt"
            second = SHARED["zygote"].start(log, world=worlds[1], **options)
            assert set(second.wait()) == {1}, second.text()
            assert "is in use by" in second.text()
            assert contents(self.folder) == before
            go.touch()

        at = min(self.at + ahead, TOTAL) - 1
        quiet = {"background": False}
        self.fit(worlds[0], meanwhile, trouble={"at": at, "where": "hold"}, checkpoints=quiet)
        assert set(self.last.codes) == {0}, self.last.text()
        held.unlink()
        go.unlink()

    @precondition(lambda self: bool(self.complete()))
    @rule()
    def test(self):
        """The newest whole checkpoint's figure is the oracle's, and nothing of the run changes."""
        before = contents(self.folder)
        told = figure_of(self.folder)
        assert contents(self.folder) == before
        if told is None:
            assert self.damaged
            return
        step, figure = told
        name = f"step-{step:08d}"
        assert name in self.complete()
        if name not in SHARED["figures"]:
            path = str(SHARED["oracle"] / "checkpoints" / name)
            SHARED["figures"][name] = figure_of(SHARED["oracle"], ckpt_path=path)[1]
        exact = {"rel": 0} if self.exact else {"rel": 1e-4}
        assert figure == pytest.approx(SHARED["figures"][name], **exact)

    @precondition(lambda self: len(self.complete()) > 1)
    @rule(how=st.sampled_from(["cut", "flip", "lose", "manifest", "nonsense", "config"]))
    def damage_the_newest(self, how):
        name = self.complete()[-1]
        folder = self.folder / "checkpoints" / name
        state, manifest = folder / "state", folder / "manifest.json"
        if how == "cut":
            os.truncate(state, state.stat().st_size // 2)
        elif how == "flip":
            content = bytearray(state.read_bytes())
            content[len(content) // 3] ^= 4
            state.write_bytes(content)
        elif how == "lose":
            state.unlink()
        elif how == "manifest":
            manifest.write_bytes(b"\xff{")
        elif how == "nonsense":
            manifest.write_text('{"files": 3}')
        else:
            (folder / "config.yaml").write_text("another: one, as long as it likes\n")
        self.damaged.add(name)

    @rule(content=st.sampled_from([b"\xff\xfe\x00", b"step-99999999\n", b""]))
    def damage_the_pointer(self, content):
        if self.at:
            (self.folder / "checkpoints" / "latest").write_bytes(content)

    @precondition(lambda self: bool(self.complete()) and not self.damaged)
    @rule()
    def convert(self):
        """What `convert` and `test` read of the run is the oracle's weights at that step."""
        (self.folder / "checkpoints" / "latest").write_text(f"{self.complete()[-1]}\n")
        source = find_checkpoint(self.folder)
        assert source.step == self.at
        oracle = find_checkpoint(SHARED["oracle"] / "checkpoints" / source.path.name).read_module()
        for key, value in source.read_module().items():
            if self.exact:
                assert value.equal(oracle[key]), key
            else:
                assert value.allclose(oracle[key], atol=2e-5), key

    # -- what must be true of it ----------------------------------------------------------------
    @invariant()
    def losses_and_batches_are_the_oracles(self):
        oracle = {line["step"]: line for line in steps(SHARED["oracle"])}
        lines = [
            line
            for path in self.folder.glob("steps-*.jsonl")
            for line in steps(self.folder, int(path.stem.removeprefix("steps-")))
        ]
        for line in lines:
            due = oracle[line["step"]]
            assert set(line["ids"]) <= set(due["ids"]), line["step"]
            if self.exact:
                assert line == due
            else:
                assert line["loss"] == pytest.approx(due["loss"], rel=2e-5)

    @invariant()
    def labels_are_the_oracles(self):
        own, oracle = rows(self.folder), {row[:2]: row[2] for row in rows(SHARED["oracle"])}
        for step, name, value in own:
            if (step, name) not in oracle:
                assert name == "val/map_avg" and step in self.cut_short
            elif name == "val/map_avg":
                assert value == pytest.approx(oracle[step, name], rel=0 if self.exact else 1e-4)
            elif self.exact:  # on several ranks rank 0 logs its own part
                assert value == oracle[step, name]
        losses = [step for step, name, _ in own if name == "train/loss"]
        assert losses == sorted(set(losses))

    def end_is_the_oracles(self):
        assert self.at == TOTAL, self.last.text()
        losses = [step for step, name, _ in rows(self.folder) if name == "train/loss"]
        assert losses == list(range(TOTAL))
        self.losses_and_batches_are_the_oracles()
        self.labels_are_the_oracles()


@pytest.fixture(scope="module")
def shared(zygote, tmp_path_factory):
    oracle = tmp_path_factory.mktemp("oracle")
    keep = {"checkpoints": {"keep_last": 0}}
    assert run(zygote, oracle, world=1, epochs=EPOCHS, **CONSTANT, **keep).codes == [0]
    SHARED.update(zygote=zygote, oracle=oracle, figures={})


def live(lives, length, **options):
    how = settings(
        max_examples=int(os.environ.get("EVA02_AT_LIVES", lives)),
        stateful_step_count=length,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        **options,
    )
    run_state_machine_as_test(RunLife, settings=how)


@pytest.mark.distributed
def test_a_few_lives_of_a_run(shared):
    live(3, 5, derandomize=True, phases=[Phase.generate])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(7200)
def test_many_lives_of_a_run(shared):
    live(200, 6, phases=[Phase.generate])
