"""Ensembles, dual softmax, and the challenge's zip: written, validated, read back."""

import json
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from epic_files import write_retrieval_split

from lightning_modules.cli.main import main
from lightning_modules.evaluation.similarity import bank_normalise, dual_softmax, ensemble
from lightning_modules.evaluation.submission import Levels, read_submission, write_submission


def test_an_ensemble_is_the_weighted_mean():
    first, second = torch.eye(2), torch.ones(2, 2)
    torch.testing.assert_close(
        ensemble([first, second], [3, 1]), torch.tensor([[1, 0.25], [0.25, 1]]).double()
    )
    assert ensemble([first]) is first


@pytest.mark.parametrize(
    ("matrices", "weights", "message"),
    [
        ([torch.ones(2, 2), torch.ones(2, 3)], None, "must be alike"),
        ([torch.ones(2, 2)] * 2, [1.0], "one positive weight each"),
        ([torch.ones(2, 2)] * 2, [1.0, 0.0], "one positive weight each"),
    ],
)
def test_ensembles_that_do_not_fit_are_refused(matrices, weights, message):
    with pytest.raises(ValueError, match=message):
        ensemble(matrices, weights)


def test_dual_softmax_is_the_product_of_both_conditionals():
    similarity = torch.tensor([[0.3, 0.1], [0.2, 0.25], [0.0, -0.5]])
    result = dual_softmax(similarity, 10.0).exp()
    exponentials = (10 * similarity.double()).exp()
    expected = exponentials**2 / exponentials.sum(0) / exponentials.sum(1, keepdim=True)
    torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match="must be positive"):
        dual_softmax(similarity, 0.0)


IDS = ["c0", "c1", "c2"], ["s0", "s1"]


def submission(tmp_path, **changes):
    """A valid submission with some entries changed, written without our writer's checks."""
    content = {
        "version": "0.1",
        "challenge": "multi_instance_retrieval",
        "sim_mat": np.full((3, 2), 0.5, np.float32),
        "vis_ids": np.array(IDS[0], dtype=object),  # as a pandas column gives them
        "txt_ids": IDS[1],
        "sls_pt": -1,
        "sls_tl": 3,
        "sls_td": 4,
    } | changes
    path = tmp_path / "test.zip"
    with zipfile.ZipFile(path, "w") as archive:
        kept = {key: value for key, value in content.items() if value is not None}
        archive.writestr("test.pkl", pickle.dumps(kept))
    return path


def test_a_submission_reads_back(tmp_path):
    cosines = torch.tensor([[1.0, -1.0], [0.5, 0.0], [-0.25, 0.75]])
    path = tmp_path / "out" / "test.zip"
    write_submission(path, cosines, *IDS, Levels(1, 2, 3))
    content = read_submission(path, *IDS)
    np.testing.assert_array_equal(content["sim_mat"], (cosines.numpy() + 1) / 2)
    assert content["sim_mat"].dtype == np.float32
    assert (content["vis_ids"], content["txt_ids"]) == IDS
    assert (content["sls_pt"], content["sls_tl"], content["sls_td"]) == (1, 2, 3)
    assert [item.name for item in path.parent.iterdir()] == ["test.zip"]
    assert read_submission(submission(tmp_path), *IDS)["sls_tl"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.2"}, "version is '0.2'"),
        ({"challenge": "action_recognition"}, "challenge is"),
        ({"sls_td": None}, "it must be a dict of"),
        ({"sls_td": 1.0}, "sls_td is 1.0"),
        ({"sls_td": -2}, "sls_td is -2"),
        ({"vis_ids": ["c1", "c0", "c2"]}, "vis_ids are not those"),
        ({"txt_ids": ["s0"]}, "txt_ids are not those"),
        ({"sim_mat": np.zeros((2, 3), np.float32)}, r"sim_mat is float32 \(2, 3\)"),
        ({"sim_mat": np.zeros((3, 2))}, "sim_mat is float64"),
        ({"sim_mat": [[0.0, 0], [0, 0], [0, 0]]}, "sim_mat is list"),
        ({"sim_mat": np.full((3, 2), -0.1, np.float32)}, "it must lie in"),
        ({"sim_mat": np.full((3, 2), np.nan, np.float32)}, "it must lie in"),
    ],
)
def test_a_broken_submission_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_submission(submission(tmp_path, **changes), *IDS)


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"refers to builtins\.print"):
        read_submission(submission(tmp_path, version=Harmful()))
    assert capsys.readouterr().out == ""


def test_other_zips_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="no readable submission"):
        read_submission(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.pkl", b"")
    with pytest.raises(ValueError, match=r"must hold test\.pkl alone"):
        read_submission(path)


@pytest.mark.parametrize("scale", [5.0, float("nan")])
def test_what_is_not_a_cosine_is_not_submitted(tmp_path, scale):
    with pytest.raises(ValueError, match="not cosines"):
        write_submission(tmp_path / "x.zip", torch.full((3, 2), scale), *IDS)


def test_score_scores_an_ensemble_and_writes_the_submission(tmp_path, capsys):
    write_retrieval_split(tmp_path, "test", 12, 5)
    draw = np.random.default_rng(0)
    first, second = (draw.uniform(-1, 1, (12, 5)).astype(np.float32) for _ in range(2))

    def score(name: str, matrix: np.ndarray, *options: str) -> dict:
        np.save(tmp_path / name, matrix)
        words = ["score", "--annotations", str(tmp_path), "--similarity", str(tmp_path / name)]
        assert main([*words, *options]) == 0
        return json.loads(capsys.readouterr().out)

    mean = score("mean.npy", 0.75 * first.astype(np.float64) + 0.25 * second)
    np.save(tmp_path / "b.npy", second)
    zipped = tmp_path / "test.zip"
    options = [str(tmp_path / "b.npy"), "--weights", "3", "1", "--submission", str(zipped)]
    assert score("a.npy", first, *options, "--sls-pt", "2") == mean
    content = read_submission(zipped)
    np.testing.assert_allclose(content["sim_mat"], (0.75 * first + 0.25 * second + 1) / 2, 1e-6)
    assert (content["sls_pt"], len(content["vis_ids"])) == (2, 12)
    sharp = score("a.npy", first, "--dual-softmax", "10")
    assert sharp["dual_softmax"] == 10
    assert sharp["map"] == score("d.npy", dual_softmax(torch.from_numpy(first), 10).numpy())["map"]


def test_a_bank_lowers_each_clip_by_its_nearness_to_the_bank():
    draw = torch.Generator().manual_seed(3)
    similarity, bank = (torch.randn(5, n, generator=draw).double() for n in (4, 7))
    found = bank_normalise(similarity, bank, 3.0)
    for v in range(5):
        near = sum(math.exp(3.0 * float(b)) for b in bank[v]) / 7
        for q in range(4):
            expected = float(similarity[v, q]) - math.log(near) / 3.0
            assert float(found[v, q]) == pytest.approx(expected)
    # the product form of the paper ranks clips alike
    ratio = (3.0 * similarity).exp() / (3.0 * bank).exp().sum(1, keepdim=True)
    assert torch.equal(found.argsort(dim=0), ratio.argsort(dim=0))
    for wrong, told in (((bank[:4], 3.0), "must have the 5 clips"), ((bank, 0.0), "positive")):
        with pytest.raises(ValueError, match=told):
            bank_normalise(similarity, *wrong)
