"""EK-100 retrieval files: columns, the shifted sentence rows, and every refusal."""

from pathlib import Path

import pytest

from datamodules.annotations.epic import read_retrieval_clips, read_sentences, retrieval_files

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def clip_row(name: str, text: str = "open door", verb: int = 3, nouns: str = "[8]") -> str:
    return (
        f"{name},P01,P01_11,00:00:01.000,01:00:00.14,01:00:03.37,8,202,{text},open,{verb},door,8,"
        f'"[\'door\']","{nouns}"'
    )


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_published_columns_are_read(tmp_path):
    path = write(
        tmp_path / "clips.csv", HEADER, clip_row("P01_11_0", '"take lid, pan"', 0, "[8, 3]")
    )
    (clip,) = read_retrieval_clips(path)
    assert clip.narration_id == "P01_11_0"
    assert clip.narration == "take lid, pan"
    assert (clip.verb_class, clip.noun_class, clip.all_noun_classes) == (0, 8, (8, 3))
    assert (clip.start_s, clip.stop_s) == (3600.14, 3603.37)


def test_sentences_take_text_and_classes_from_the_named_clip_in_file_order(tmp_path):
    clips = read_retrieval_clips(
        write(
            tmp_path / "clips.csv",
            HEADER,
            clip_row("a", "open door", 3, "[8]"),
            clip_row("b", "take lid", 0, "[9]"),
            clip_row("c", "wash cup", 2, "[13, 4]"),
        )
    )
    # the texts are shifted by one, as in the last rows of the published file
    path = write(tmp_path / "s.csv", "narration_id,narration", "c,take lid", "a,wash cup", "b,?")
    sentences = read_sentences(path, clips)
    assert [s.text for s in sentences] == ["wash cup", "open door", "take lid"]
    assert [s.verb_class for s in sentences] == [2, 3, 0]
    assert [s.all_noun_classes for s in sentences] == [(13, 4), (8,), (9,)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no column 'narration_id'"),
        ([HEADER], "no rows"),
        ([HEADER.replace("verb_class", "verb_id"), clip_row("a")], "no column 'verb_class'"),
        ([HEADER, clip_row("a", nouns="[8,")], "row 1: all_noun_classes.*not a list of integers"),
        ([HEADER, clip_row("a", nouns="__import__('os').getcwd()")], "not a list of integers"),
        ([HEADER, clip_row("a", nouns="['door']")], "not a list of integers"),
        ([HEADER, clip_row("a").replace("01:00:03.37", "3.37")], "stop_timestamp.*HH:MM:SS"),
        ([HEADER, clip_row("a").replace(",3,door", ",x,door")], "verb_class.*not an integer"),
        ([HEADER, clip_row("a"), clip_row("a")], "row 2.*occurs twice"),
        ([HEADER, "a,P01"], "row 1.*number of fields"),
        ([HEADER, clip_row("a", "two, fields")], "row 1.*number of fields"),
    ],
)
def test_malformed_clip_files_are_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_retrieval_clips(write(tmp_path / "clips.csv", *lines))


def test_not_utf8_and_missing_files_are_refused(tmp_path):
    (tmp_path / "clips.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_retrieval_clips(tmp_path / "clips.csv")
    with pytest.raises(ValueError, match="does not exist"):
        read_retrieval_clips(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=r"no EPIC_100_retrieval_test.csv and no"):
        retrieval_files(tmp_path, "test")


def test_a_sentence_of_another_split_is_refused(tmp_path):
    clips = read_retrieval_clips(write(tmp_path / "clips.csv", HEADER, clip_row("a")))
    path = write(tmp_path / "s.csv", "narration_id,narration", "z,open door")
    with pytest.raises(ValueError, match="no clip has narration_id 'z'"):
        read_sentences(path, clips)


def test_files_are_found_in_a_clone_of_the_annotation_repository(tmp_path):
    folder = tmp_path / "retrieval_annotations"
    folder.mkdir()
    expected = tuple(
        write(folder / f"EPIC_100_retrieval_train{tail}.csv", "x") for tail in ("", "_sentence")
    )
    assert retrieval_files(tmp_path, "train") == expected
