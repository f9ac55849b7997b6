"""Odd rows of annotation files: refused by name, or left out and counted; the rest is read."""

import csv
import io
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.annotations.formats import read_clips
from datamodules.annotations.mapped import Columns
from datamodules.annotations.rows import Rejects
from datamodules.annotations.table import parse_clock, parse_int, parse_seconds, split_rows

EGOCLIP_HEADER = (
    "clip_idx\tvideo_uid\tvideo_dur\tnarration_source\tnarration_ind\tnarration_time\tclip_start\t"
    "clip_end\tclip_text\ttag_verb\ttag_noun"
)


def egoclip_row(text="#C C cuts", *, start="1.0", end="2.0", verbs="[4]", nouns="[12]"):
    return f"0\tu\t9.0\tpass_1\t0\t1.5\t{start}\t{end}\t{text}\t{verbs}\t{nouns}"


def read(tmp_path, format, content, columns=None):
    """Clips and rejects of a file with this content; and that it is refused without a list."""
    path = tmp_path / ("table.tsv" if format == "egoclip" else "table.csv")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rejects = Rejects()
    clips = read_clips(path, format, columns, rejects)
    if rejects.rows:
        first = rejects.rows[0]
        with pytest.raises(ValueError, match=rf"table.*, row {first['row']}: "):
            read_clips(path, format, columns)
    return clips, rejects.rows


BAD_EGOCLIP = {
    "an extra tab": (egoclip_row() + "\textra", "its number of fields is 12, not the header's 11"),
    "too few columns": ("0\tu\t9.0", "its number of fields is 3"),
    "a quote never closed": (egoclip_row('"opens x'), "a quote that opens a field is not closed"),
    "a field without end": (egoclip_row("x" * 131_073), "field larger than field limit"),
    "an empty tag": (egoclip_row(verbs=""), "tag_verb: '' is not a list of integers"),
    "a nan tag": (egoclip_row(nouns="nan"), "tag_noun: 'nan' is not a list of integers"),
    "an underscore in a tag": (egoclip_row(nouns="[1_2]"), "tag_noun: '[1_2]' is not a list"),
    "an id of 2^63": (egoclip_row(nouns=f"[{2**63}]"), "is no integer from 0 to 2^63 - 1"),
    "a negative id": (egoclip_row(verbs="[-1]"), "class id -1 is no integer from 0"),
    "a bomb of brackets": (egoclip_row(verbs="[" * 100_000), "is not a list of integers"),
    "code": (egoclip_row(verbs="__import__('os')"), "is not a list of integers"),
    "no text": (egoclip_row(""), "its text is blank"),
    "a blank text": (egoclip_row("  "), "its text is blank"),
    "no time": (egoclip_row(end=""), "clip_end: '' is not a time"),
    "not a number": (egoclip_row(start="nan"), "clip_start: 'nan' is not a time"),
    "without end": (egoclip_row(end="inf"), "clip_end: 'inf' is not a time"),
    "other digits": (egoclip_row(end="1_0"), "clip_end: '1_0' is not a time"),
}


@pytest.mark.parametrize("name", BAD_EGOCLIP)
def test_an_odd_row_is_left_out_with_its_number_and_reason(tmp_path, name):
    bad, reason = BAD_EGOCLIP[name]
    lines = [EGOCLIP_HEADER, egoclip_row("first"), bad, egoclip_row("third"), egoclip_row("fourth")]
    clips, rejects = read(tmp_path, "egoclip", "\n".join(lines) + "\n")
    assert [(clip.clip_id, clip.texts) for clip in clips] == [
        ("0", ("first",)),
        ("2", ("third",)),
        ("3", ("fourth",)),
    ]
    assert [row["row"] for row in rejects] == [2] and reason in rejects[0]["reason"]
    assert rejects[0]["clip_id"] == "(row 2)"


def test_bytes_that_are_not_utf8_cost_their_row_alone(tmp_path):
    lines = [EGOCLIP_HEADER, egoclip_row("caf\u00e9"), egoclip_row("BAD"), egoclip_row("third")]
    content = "\n".join(lines).encode().replace(b"BAD", b"caf\xe9")
    clips, rejects = read(tmp_path, "egoclip", content)
    assert [clip.texts for clip in clips] == [("caf\u00e9",), ("third",)]
    assert [(row["row"], row["reason"]) for row in rejects] == [(2, "it is not UTF-8")]


def test_a_file_without_a_good_row_is_refused_with_the_first_reason(tmp_path):
    with pytest.raises(
        ValueError, match="no row can be used; row 1: clip_start: 'x' is not a time"
    ):
        read(tmp_path, "egoclip", f"{EGOCLIP_HEADER}\n{egoclip_row(start='x')}\n")


# What pandas 3.1.1 gives for these lines by read_csv(sep="\t", on_bad_lines="skip"), which is how
# EgoVLP reads egoclip.csv.
QUOTES = {
    '"x" y': "x y",
    'the "x"': 'the "x"',
    '6" pipe': '6" pipe',
    '"all of it"': "all of it",
    '"he says ""x"""': 'he says "x"',
    "'x'": "'x'",
    '"x"y"z': 'xy"z',
}


@pytest.mark.parametrize("field", QUOTES)
def test_quotes_mean_what_they_mean_to_egovlps_reader(tmp_path, field):
    lines = [EGOCLIP_HEADER, egoclip_row(field), egoclip_row("next")]
    clips, rejects = read(tmp_path, "egoclip", "\n".join(lines))
    assert [clip.texts[0] for clip in clips] == [QUOTES[field], "next"] and rejects == []


def test_two_open_quotes_do_not_make_one_row_of_two(tmp_path):
    rows = ["a,1,2,good", 'b,1,2,"opens x', 'c,1,2,"closes y', "d,1,2,good", 'e,1,2,"to the end']
    content = "\n".join(["video_id,start_second,end_second,text", *rows])
    clips, rejects = read(tmp_path, "egohod", content)
    assert [clip.video_id for clip in clips] == ["a", "d"]
    assert [row["row"] for row in rejects] == [2, 3, 5]
    assert {row["reason"] for row in rejects} == {"a quote that opens a field is not closed"}


@given(
    st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([",", "\t"]),
)
def test_whatever_python_writes_is_read_back(rows, delimiter):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    file.seek(0)
    assert list(split_rows(file, delimiter)) == rows


@given(st.lists(st.text('ab",\n', max_size=12), max_size=8))
def test_any_text_is_split_without_losing_a_line(lines):
    file = io.StringIO("".join(line.replace("\n", "") + "\n" for line in lines), newline="")
    text = file.getvalue()
    rows = list(split_rows(file, ","))
    # a line is a row of its own, refused, or a part of a row that is read strictly
    inner = sum(field.count("\n") for row in rows if isinstance(row, list) for field in row)
    filled = sum(1 for line in text.splitlines() if line)
    assert filled <= len(rows) + inner <= len(text.splitlines())


BAD_TIMES = [
    "-00:00:01",
    "00:00:1_0",
    "+00:00:01",
    "00:-1:00",
    "0:60:00",
    "1:2",
    "1:2:3:4",
    "::",
    "",
]


@pytest.mark.parametrize("text", [*BAD_TIMES, "00:00:nan", "00:00:1e1", "\u0661:00:00"])
def test_times_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="is not a time"):
        parse_clock(text, "here")
    with pytest.raises(ValueError, match="is not a time"):
        parse_seconds(text, "here")


@pytest.mark.parametrize("text", ["1_0", "+1", "1e400", "0x1", "\u0661", "1 0", "--1"])
def test_numbers_of_other_kinds_are_refused(text):
    with pytest.raises(ValueError, match="is not a time"):
        parse_seconds(text, "here")
    with pytest.raises(ValueError, match="is not an integer"):
        parse_int(text, "here")


def test_times_that_are_written_in_files_are_read():
    for text, value in {
        " 1.5": 1.5,
        "-0.5": -0.5,
        ".5": 0.5,
        "1e-3": 0.001,
        "01:02:03.5 ": 3723.5,
    }.items():
        assert parse_seconds(text, "here") == value


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("u", 1, 2, ""), "its text is missing"),
        (("u", 1, 2, ["", " "]), "its text is missing"),
        (("u", float("nan"), 2, "x"), "is no two times"),
        (("u", 1, float("inf"), "x"), "is no two times"),
        (("u", 1, 10**400, "x"), "is not (uid, start, end, texts)"),
        (("u", 1, 2, "\ud800"), "is no valid Unicode"),
        ((5, 1, 2, "x"), "is not (uid, start, end, texts)"),
        ({"uid": "u"}, "is not (uid, start, end, texts)"),
        (None, "is not (uid, start, end, texts)"),
    ],
)
def test_odd_rows_of_a_pickle(tmp_path, row, reason):
    good = ("u", 1.0, 2.0, "cuts")
    clips, rejects = read(tmp_path, "lavila", pickle.dumps([good, row, good]))
    assert [clip.clip_id for clip in clips] == ["0", "2"]
    assert rejects[0]["row"] == 2 and reason in rejects[0]["reason"]


def test_charades_egos_rows_with_an_id_only_are_videos_without_actions(tmp_path):
    (tmp_path / "Charades_v1_classes.txt").write_text("c000 Holding some clothes\n")
    lines = ["id,a,b,c,d,e,f,g,h,actions,length", "A,,,,,,,,,c000 0 1,9", "B,,,,,,,,,,", "C"]
    lines += ["D,,,,,,,,,c001 0 1,9", "E,,,,,,,,,c000 0,9", "F,x"]
    clips, rejects = read(tmp_path, "charades_ego", "\n".join(lines))
    assert [clip.clip_id for clip in clips] == ["A_0"]
    reasons = [(row["row"], row["reason"][:20]) for row in rejects]
    assert reasons == [
        (4, "class c001 is not am"),
        (5, "action 'c000 0' is n"),
        (6, "2 fields; at least 1"),
    ]
    clips, rejects = read(tmp_path, "charades_ego_test", "\n".join(lines[:4]))
    assert [clip.clip_id for clip in clips] == ["A"]
    assert [row["reason"] for row in rejects] == ["it has no length"] * 2


def test_a_name_that_comes_twice_is_left_out_the_second_time(tmp_path):
    content = "id,video_id,start_second,end_second,text\nx,v,0,1,a\nx,v,1,2,b\n"
    clips, rejects = read(tmp_path, "csv", content, Columns(clip_id="id"))
    assert [clip.texts for clip in clips] == [("a",)]
    assert rejects[0]["row"] == 2 and "'x' occurs twice" in rejects[0]["reason"]


def test_an_odd_question_of_egomcq_costs_itself(tmp_path):
    def question(uid, **changed):
        clip = {"video_uid": uid, "clip_start": 0, "clip_end": 1, "clip_text": "t", **changed}
        choices = {str(k): {**clip, "clip_start": k / 10} for k in range(5)}
        return {"answer": 0, "types": 1, "query": clip, "choices": choices}

    odd = [question(5), question("b", clip_text=""), question("b", clip_end="nan"), {}, None]
    questions = [question("a"), *odd, question("c")]
    content = json.dumps({str(k): q for k, q in enumerate(questions)})
    clips, rejects = read(tmp_path, "egomcq", content)
    assert [clip.video_id for clip in clips] == ["a"] * 5 + ["c"] * 5
    assert [row["row"] for row in rejects] == [2, 3, 4, 5, 6]
