"""The same losses on any number of ranks and under any strategy, to the rounding stated here."""

import pytest
from cluster_runs import average, run
from tiny_run import STEPS_PER_EPOCH, steps

# fp32: only the order in which gradients of a global batch are summed differs between strategies
# and world sizes, 1e-7 a step, which AdamW's division by sqrt(v) amplifies on the first ones
FP32 = {"rel": 2e-5}
STRATEGIES = ["ddp", "zero1", "zero2", "zero3"]


def losses(folder):
    return [line["loss"] for line in steps(folder)]


@pytest.fixture(scope="module")
def one_process(zygote, tmp_path_factory):
    """optimiser -> losses and averaged weights of a single process on the same global batches."""
    known = {}

    def losses_of(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            assert run(zygote, folder, world=1, optimizer={"name": name}, ema=True).codes == [0]
            known[name] = losses(folder), average(folder)
        return known[name]

    return losses_of


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [*((strategy, "adamw") for strategy in STRATEGIES), ("zero2", "lamb"), ("zero3", "lamb")],
)
def test_two_ranks_equal_one_process(zygote, tmp_path, one_process, strategy, optimizer):
    options = {"optimizer": {"name": optimizer}, "checkpoints": {"every_n_steps": 0}}
    done = run(zygote, tmp_path, strategy=strategy, **options)
    assert done.codes == [0, 0], done.text()
    assert losses(tmp_path) == pytest.approx(one_process(optimizer)[0], **FP32)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "worlds", [(2, 1, 2), pytest.param((4, 2, 4), marks=pytest.mark.slow)], ids=str
)
def test_another_world_size_goes_on_with_the_same_batches(
    zygote, tmp_path, one_process, strategy, worlds
):
    """The number of ranks changes twice, mid-epoch each time."""
    for world, stop_at in zip(worlds, (2, 6, None), strict=True):
        trouble = {"at": stop_at, "where": "train", "rank": world - 1}
        done = run(zygote, tmp_path, world=world, strategy=strategy, trouble=trouble, ema=True)
        assert done.codes == [0 if stop_at is None else 85] * world, done.text()
    expected_losses, expected_average = one_process("adamw")
    assert losses(tmp_path) == pytest.approx(expected_losses, **FP32)
    for name, values in average(tmp_path).items():
        # weights that AdamW has moved by up to 0.3; of small ones the rounding is relative to that
        assert values == pytest.approx(expected_average[name], abs=2e-5)
    lines = [line for rank in range(max(worlds)) for line in steps(tmp_path, rank)]
    for step in range(3 * STEPS_PER_EPOCH):
        ids = sorted(i for line in lines if line["step"] == step for i in line["ids"])
        epoch, within = divmod(step, STEPS_PER_EPOCH)
        assert ids == [1000 * epoch + 8 * within + i for i in range(8)]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_accumulated_steps_are_stopped_at_and_gone_on_with_whole(zygote, tmp_path, strategy):
    """A checkpoint cannot hold half an optimiser step: a stop waits for the step's end."""
    options = {"strategy": strategy, "accumulate": STEPS_PER_EPOCH}
    assert run(zygote, tmp_path / "whole", **options).codes == [0, 0]
    stopped = run(zygote, tmp_path / "parts", trouble={"at": 1, "where": "train"}, **options)
    assert stopped.codes == [85, 85], stopped.text()
    assert len(steps(tmp_path / "parts")) == 2 * STEPS_PER_EPOCH
    assert run(zygote, tmp_path / "parts", **options).codes == [0, 0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.distributed
def test_an_epoch_that_accumulation_does_not_divide_is_refused_under_zero(zygote, tmp_path):
    """DDP steps on the rest of an epoch, DeepSpeed carries it over into the next."""
    refused = run(zygote, tmp_path, strategy="zero2", accumulate=2)
    assert refused.codes == [1, 1]
    assert "accumulate_grad_batches" in refused.text()
