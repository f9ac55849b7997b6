"""What the tests of this room share: a zygote that starts ranks, and a SLURM cluster."""

import os

import pytest
import tiny_run
from cluster_runs import REAL, average, curve, run
from rank_zygote import Zygote
from slurm_cluster import SlurmCluster, why_not
from small_disks import mounted
from small_recipe import write_recipe


@pytest.fixture(scope="session")
def zygote():
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real cluster of two nodes; CI sets EVA02_AT_REQUIRE_SLURM so that it cannot be skipped."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("EVA02_AT_REQUIRE_SLURM"):
            pytest.fail(f"the SLURM tests must run here: {reason}")
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def untouched(zygote, tmp_path_factory):
    """strategy -> (curve, validations, average) of a run that nobody stops."""
    known = {}

    def curve_of(strategy, world=2, **options):
        key = strategy, world, *sorted(options.items())
        if key not in known:
            folder = tmp_path_factory.mktemp("untouched")
            done = run(zygote, folder, world=world, strategy=strategy, **REAL, **options)
            assert done.codes == [0] * world, done.text()
            known[key] = curve(folder, world), tiny_run.validations(folder), average(folder)
        return known[key]

    return curve_of


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A recipe file; its 32 clips are in 4 shards."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, which a few checkpoints fill."""
    with mounted(tmp_path / "disk", 256) as folder:
        yield folder
