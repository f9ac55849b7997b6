"""Readers of the field's annotation formats, traps and refusals included."""

import json
import os
import pickle

import numpy as np
import pytest

from datamodules.annotations.charades_ego import read_charades_clips, read_charades_tests
from datamodules.annotations.egomcq import INTER_VIDEO, read_egomcq, read_egomcq_clips
from datamodules.annotations.formats import FORMATS, read_clips
from datamodules.annotations.lavila import read_lavila
from datamodules.annotations.mapped import Columns
from datamodules.manifest import ClipRecord

EGOCLIP = (
    "clip_idx\tvideo_uid\tvideo_dur\tnarration_source\tnarration_ind\tnarration_time\tclip_start\t"
    "clip_end\tclip_text\ttag_verb\ttag_noun\n"
    "0\tuid-a\t100.0\tnarration_pass_1\t0\t0.2\t-0.5\t0.9\t#C C picks up the bag\t[4, 7]\t[12]\n"
    "1\tuid-b\t100.0\tnarration_pass_1\t1\t5.0\t4.5\t5.5\t#C C looks around\t[9]\t[]\n"
)


def test_egoclip(tmp_path):
    path = tmp_path / "egoclip.csv"
    path.write_text(EGOCLIP)
    assert read_clips(path, "egoclip") == [
        ClipRecord("0", "uid-a", 0.0, 0.9, ("#C C picks up the bag",), (4, 7), (12,)),
        ClipRecord("1", "uid-b", 4.5, 5.5, ("#C C looks around",), (9,), ()),
    ]
    path.write_text(EGOCLIP.replace("[12]", "__import__('os')"))
    with pytest.raises(ValueError, match=r"row 1: tag_noun.*not a list of integers"):
        read_clips(path, "egoclip")


def test_lavila_pickles_of_all_three_kinds(tmp_path):
    path = tmp_path / "ego4d.pkl"
    rows = [
        ("uid-a", -1.0, np.float64(2.5), "#C C cuts"),
        ("uid-a", 2, 3, ["one", " ", "two "]),
        ("uid-b", np.float32(0.5), 1.5, ["x"] * 10, [np.float32(-1.25)] * 10),
    ]
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps(rows, protocol=protocol))
        assert read_lavila(path) == [
            ClipRecord("0", "uid-a", 0.0, 2.5, ("#C C cuts",)),
            ClipRecord("1", "uid-a", 2.0, 3.0, ("one", "two")),
            ClipRecord("2", "uid-b", 0.5, 1.5, ("x",) * 10),
        ]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([Evil()]), "refers to posix.system"),
        (pickle.dumps([np.array([1, 2])]), "refers to numpy"),
        (pickle.dumps([np.array([Evil()], dtype=object)[0:1]]), "refers to"),
        (b"c_codecs\nencode\n(Vx\nVzlib\ntR.", "codec 'zlib'"),
        (b"cbuiltins\neval\n(V1+1\ntR.", "refers to builtins.eval"),
        (pickle.dumps({"a": 1}), "no list of rows but dict"),
        (pickle.dumps([("uid", 1, 2, [])]), "row 1: its text is missing"),
        (b"garbage", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_other_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lavila("x.pkl")
    assert not (tmp_path / "evil").exists()


def test_egohod_and_mapped_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("video_id,start_second,end_second,text,uid\nv,1,2.5,cuts,u\n")
    assert read_clips(path, "egohod") == [ClipRecord("0", "v", 1.0, 2.5, ("cuts",))]
    path.write_text('id,vid,from,to,said,v,n\nq,v1,00:01:01.5,62,"a, b",3,"[4, 5]"\n')
    words = "video_id=vid start_s=from end_s=to text=said clip_id=id verb_classes=v noun_classes=n"
    columns = Columns.parse(words.split())
    expected = [ClipRecord("q", "v1", 61.5, 62.0, ("a, b",), (3,), (4, 5))]
    assert read_clips(path, "csv", columns) == expected
    with pytest.raises(ValueError, match="column 'txt=said'"):
        Columns.parse(["txt=said"])
    with pytest.raises(ValueError, match=r"no column .*'nope'"):
        read_clips(path, "csv", Columns(text="nope"))
    with pytest.raises(ValueError, match="unknown annotation format"):
        read_clips(path, "nope")


CHARADES = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length,x\n"
    'AAAAEGO,s,k,6,7,Yes,"a, b",o,d,c001 0.0 5.1;c000 11.9 21.2,30.5,1\n'
    "BBBBEGO,s,k,6,7,Yes,s,o,d,,12.0,1\n"
)


def test_charades_ego(tmp_path):
    (tmp_path / "Charades_v1_classes.txt").write_text(
        "c000 Holding some clothes\nc001 Opening a bag"
    )
    path = tmp_path / "CharadesEgo_v1_train_only1st.csv"
    path.write_text(CHARADES)
    assert read_charades_clips(path) == [
        ClipRecord("AAAAEGO_0", "AAAAEGO", 0.0, 5.1, ("Opening a bag",), (1,)),
        ClipRecord("AAAAEGO_1", "AAAAEGO", 11.9, 21.2, ("Holding some clothes",), (0,)),
    ]
    texts = ("Holding some clothes", "Opening a bag")
    assert read_charades_tests(path) == [
        ClipRecord("AAAAEGO", "AAAAEGO", 0.0, 30.5, texts, (0, 1)),
        ClipRecord("BBBBEGO", "BBBBEGO", 0.0, 12.0, ("",), ()),
    ]
    path.write_text(CHARADES.replace("c001 0.0 5.1", "c001 0.0"))
    with pytest.raises(ValueError, match=r"row 1: action 'c001 0.0' is not"):
        read_charades_clips(path)
    (tmp_path / "Charades_v1_classes.txt").write_text("c001 Opening a bag\n")
    with pytest.raises(ValueError, match=r"line 1.*is not `c000 TEXT`"):
        read_charades_clips(path)


def test_egomcq(tmp_path):
    def choice(k):
        return {
            "video_uid": f"u{k}",
            "clip_start": k - 0.5,
            "clip_end": k + 1,
            "clip_text": f"t{k}",
        }

    question = {
        "answer": 3,
        "types": 1,
        "query": {"clip_text": "what?", **choice(3)},
        "choices": {str(k): choice(k) for k in range(5)},
    }
    question["query"]["clip_text"] = "what?"
    path = tmp_path / "egomcq.json"
    path.write_text(json.dumps({"0": question, "1": {**question, "types": 2}}))
    first, second = read_egomcq(path)
    clips = read_egomcq_clips(path)
    assert (first.text, first.answer, first.kind) == ("what?", 3, INTER_VIDEO)
    assert [clip.clip_id for clip in clips] == list(first.clip_ids) == list(second.clip_ids)
    assert (clips[0].start_s, clips[0].end_s, clips[3].texts) == (0.0, 1.0, ("t3",))
    path.write_text(json.dumps({"0": {**question, "answer": 5}}))
    with pytest.raises(ValueError, match="question 0: answer 5"):
        read_egomcq(path)
    path.write_text(json.dumps({"1": question}))
    with pytest.raises(ValueError, match="keys"):
        read_egomcq(path)


@pytest.mark.parametrize("format", FORMATS)
def test_missing_and_empty_files_are_one_clear_error(tmp_path, format):
    (tmp_path / "Charades_v1_classes.txt").write_text("c000 Holding some clothes\n")
    with pytest.raises(ValueError, match="does not exist"):
        read_clips(tmp_path / "absent", format)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError):
        read_clips(tmp_path / "empty", format)
