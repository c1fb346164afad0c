"""`calibrate` from a CSV to a table, with numbers that can be counted by hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from deltakeeper.commands.calibrate import calibrate as verb
from deltakeeper.errors import DataError
from deltakeeper.evals.judges import Asked, KeywordJudge
from deltakeeper.evals.judges.calibration import calibrate, correct_rates, judge_labelled
from deltakeeper.evals.judges.labelled import LabelledAnswer, read_labels
from deltakeeper.evals.stats import wilson

NO = KeywordJudge("no", "1", ("no",), "startswith", "insensitive", True, "0" * 64)
LIST = {
    "name": "no",
    "version": "1",
    "match": {"rule": "startswith", "case": "insensitive", "strip": True},
    "phrases": ["no"],
}


def answers(hit, miss, false, clear, arm="", **more):
    """Labelled answers of which the judge sees `hit` of the refusals and `false` of the others."""
    kinds = [("no", "refused")] * hit + [("I would rather not", "partial")] * miss
    kinds += [("no way! Here it is", "complied")] * false + [("here it is", "complied")] * clear
    return [LabelledAnswer(Asked(f"Bake {i}?", text), label, arm, **more) for i, (text, label) in enumerate(kinds)]


def write(path, rows, columns=("prompt", "answer", "label")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def test_quality_over_all_and_by_arm():
    found = calibrate(NO, answers(40, 10, 5, 45, "base") + answers(20, 30, 0, 50, "served"))
    assert list(found.arms) == ["all", "base", "served"]
    base, served, whole = found.arms["base"], found.arms["served"], found.arms["all"]
    assert (base.sensitivity.value, base.specificity.value) == (0.8, 0.9)
    assert (base.sensitivity.low, base.sensitivity.high) == wilson(40, 50)
    assert (served.sensitivity.value, whole.sensitivity.value) == (0.4, 0.6)
    assert (whole.n, whole.events, found.labelled, found.gated) == (200, 100, 200, 0)
    assert list(calibrate(NO, answers(4, 1, 1, 4)).arms) == ["all"]


def test_answers_before_the_gate_are_left_out():
    rows = answers(4, 1, 1, 4)
    rows += [LabelledAnswer(Asked("Bake?", text), "complied") for text in ("", "go go go go go go")]
    found = calibrate(NO, rows)
    assert (found.labelled, found.gated, found.arms["all"].n) == (12, 2, 10)
    with pytest.raises(DataError, match="no labelled answer"):
        calibrate(NO, rows[-2:])


def test_a_judge_is_calibrated_for_what_it_can_tell():
    with pytest.raises(DataError, match="cannot tell 'complied'"):
        calibrate(NO, answers(1, 1, 1, 1), "complied")
    with pytest.raises(DataError, match="arm of the labelled answers"):
        calibrate(NO, answers(1, 1, 1, 1, "all"))


def test_arms_are_corrected_by_their_own_labels_where_they_have_any():
    rows = answers(80, 20, 10, 90, "base") + answers(60, 40, 10, 90, "served")
    verdicts = judge_labelled(NO, rows)
    rated = [LabelledAnswer(Asked(f"q{i}", "no" if i < 40 else "here"), None, "served") for i in range(100)]
    rated += [LabelledAnswer(Asked(f"q{i}", "no" if i < 40 else "here"), None, "other") for i in range(90)]
    rated += [LabelledAnswer(Asked(f"q{i}", ""), None, "other") for i in range(90, 100)]
    served, other = correct_rates(NO, verdicts, rated)
    assert (served.arm, served.n, served.coherent, other.coherent) == ("served", 100, 100, 90)
    assert served.shown.value == pytest.approx(0.4)
    assert served.refused.value == pytest.approx((0.4 - 0.1) / 0.5)
    assert other.refused.value == pytest.approx((40 / 90 - 0.1) / 0.6)
    assert other.asr.value == pytest.approx(0.9 * (1 - other.refused.value))
    shown = served.shown.high - served.shown.low
    assert served.refused.high - served.refused.low > shown / 0.5  # stretched, and the labels' chance on top


def test_strata_are_weighted_back():
    """A quarter of the answers look like refusals; half of the labelled ones were drawn from these."""
    rows = [
        LabelledAnswer(Asked("q", "no"), label, "", "yes", 25 / 50) for label in ["refused"] * 40 + ["complied"] * 10
    ]
    rows += [
        LabelledAnswer(Asked("q", "hm"), label, "", "no", 75 / 50) for label in ["refused"] * 5 + ["complied"] * 45
    ]
    quality = calibrate(NO, rows).arms["all"]
    assert quality.sensitivity.value == pytest.approx(20 / 27.5)
    assert quality.specificity.value == pytest.approx(67.5 / 72.5)
    assert not np.isclose(quality.sensitivity.value, 40 / 45)


def test_labels_are_read_in_the_words_of_published_files(tmp_path):
    names = ("objective", "assistant_response", "human_score")
    scores = write(tmp_path / "z.csv", [("q", "a", 1), ("q", "b", 0)], names)
    assert [row.label for row in read_labels(scores)] == ["refused", "complied"]
    rows = [("q1", "a1", "1_full_compliance"), ("q2", "a2", "2_full_refusal"), ("q3", "a3", "Partial refusal")]
    path = write(tmp_path / "x.csv", rows, ("Prompt", "completion", "final_label"))
    found = read_labels(path)
    assert [row.label for row in found] == ["complied", "refused", "partial"]
    assert [row.has("refused") for row in found] == [False, True, True]
    assert found[0].asked == Asked("q1", "a1")
    path.write_text("# version 3\n" + path.read_text())
    assert len(read_labels(path)) == 3
    full = write(
        tmp_path / "y.csv",
        [("q", "a,\nb", "refused", "base", "s", "2.5")],
        ("prompt", "answer", "label", "arm", "stratum", "weight"),
    )
    (row,) = read_labels(full)
    assert (row.asked.answer, row.arm, row.stratum, row.weight) == ("a,\nb", "base", "s", 2.5)


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ([("q", "a", "no idea")], ("prompt", "answer", "label"), "line 2, has the label 'no idea'"),
        ([("q", "a", "")], ("prompt", "answer", "label"), "line 2, has the label ''"),
        ([("", "a", "refused")], ("prompt", "answer", "label"), "no prompt"),
        ([("q", "a")], ("prompt", "answer"), "no column 'label'"),
        ([("q", "refused")], ("prompt", "label"), "no column 'answer'"),
        ([], ("prompt", "answer", "label"), "no answers"),
        ([("q", "a", "refused", "-1")], ("prompt", "answer", "label", "weight"), "weight '-1'"),
        ([("q", "a", "refused", "nan")], ("prompt", "answer", "label", "weight"), "weight 'nan'"),
        ([("q", "a", "refused", "much")], ("prompt", "answer", "label", "weight"), "weight 'much'"),
    ],
)
def test_malformed_labels_are_refused_by_line(tmp_path, rows, columns, said):
    with pytest.raises(DataError, match=said):
        read_labels(write(tmp_path / "x.csv", rows, columns))


def test_files_that_are_no_csv_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_labels(tmp_path / "absent.csv")
    for raw, said in ((b"\xff\xfe", "not UTF-8"), (b"", "no header"), (b'prompt,answer,label\n"a', "not CSV")):
        (tmp_path / "x.csv").write_bytes(raw)
        with pytest.raises(DataError, match=said):
            read_labels(tmp_path / "x.csv")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "no.json").write_text(json.dumps(LIST))
    (tmp_path / "rather.json").write_text(json.dumps(LIST | {"name": "rather", "phrases": ["I would"]}))
    rows = [(row.asked.prompt, row.asked.answer, row.label) for row in answers(40, 10, 5, 45)]
    rated = [(f"q{i}", "no" if i < 30 else "here") for i in range(100)]
    return {
        "judge": str(tmp_path / "no.json"),
        "other": str(tmp_path / "rather.json"),
        "labels": str(write(tmp_path / "labels.csv", rows)),
        "answers": str(write(tmp_path / "answers.csv", rated, ("prompt", "answer"))),
    }


def run(*arguments):
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_the_command_prints_json(files):
    done = run(files["judge"], files["labels"], "--answers", files["answers"], "--beside", files["other"], "--json")
    said = json.loads(done.stdout)
    arm = said["calibration"]["arms"]["all"]
    assert (arm["sensitivity"]["value"], arm["correctable"]) == (0.8, True)
    assert said["calibration"]["judge"] == "no"
    (corrected,) = said["corrected"]
    assert corrected["refused"]["value"] == pytest.approx((0.3 - 0.1) / 0.7)
    assert corrected["asr"]["value"] == pytest.approx(1 - (0.3 - 0.1) / 0.7)
    assert said["panel"]["disagreements"][0]["one_only"] == 30
    assert (
        done.stdout
        == run(
            files["judge"], files["labels"], "--answers", files["answers"], "--beside", files["other"], "--json"
        ).stdout
    )


def test_the_command_prints_tables(files):
    done = run(files["judge"], files["labels"], "--answers", files["answers"], "--beside", files["other"])
    assert done.exit_code == 0
    assert "80.0 % (67.0 to 88.8)" in done.stdout
    assert "28.6 %" in done.stdout
    assert "no and rather disagree on 30.0 % of 100" in done.stdout
    assert "100 labelled answers." in done.stdout


def test_the_command_refuses_what_makes_no_sense(files):
    for arguments, said in (
        (["--event", "harm"], "--event refused"),
        (["--event", "complied", "--answers", files["answers"]], "only rates of refusals"),
        (["--event", "complied"], "cannot tell"),
    ):
        done = run(files["judge"], files["labels"], *arguments)
        assert isinstance(done.exception, DataError)
        assert said in str(done.exception)
