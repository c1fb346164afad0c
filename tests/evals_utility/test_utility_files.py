"""Benchmark files as people give them: what is read from them, and what is refused."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from utility_cases import CHOICES, PHYSICAL, SUMS, TEXT, TRUTHS, write_benchmarks, write_rows

from deltakeeper.errors import DataError
from deltakeeper.evals.utility import choose, parse_task
from deltakeeper.evals.utility import rows as rows_module
from deltakeeper.evals.utility.files import (
    read_gsm8k,
    read_mmlu,
    read_passages,
    read_piqa,
    read_truthfulqa,
)
from deltakeeper.evals.utility.tasks import LOCAL, TaskSource, read_source, write_tasks


@pytest.fixture
def folder(tmp_path):
    return write_benchmarks(tmp_path)


def test_each_benchmark_is_read_and_hashed(folder):
    sums, choices, physical = (LOCAL[name].read(folder / name) for name in ("gsm8k", "mmlu", "piqa"))
    assert list(sums.rows) == SUMS[:4]
    assert list(sums.shots) == SUMS[4:]
    assert list(choices.rows) == CHOICES
    assert choices.strata == tuple(row["subject"] for row in CHOICES)
    assert [row["label"] for row in physical.rows] == [0, 1, 0]
    assert physical.rows[1] == PHYSICAL[1] | {"label": 1}
    for data in (sums, choices, physical):
        assert data.sources == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in data.sources}
    assert {path.rsplit("/", 1)[1] for path in physical.sources} == {"valid.jsonl", "valid-labels.lst"}


def test_a_single_file_serves_as_well_as_a_folder(folder):
    assert read_gsm8k(folder / "gsm8k" / "test.jsonl") == read_gsm8k(folder / "gsm8k")
    (folder / "gsm8k" / "train.jsonl").unlink()
    assert read_gsm8k(folder / "gsm8k").shots == ()
    labelled = write_rows(folder / "own.jsonl", [row | {"label": "1"} for row in PHYSICAL])
    assert [row["label"] for row in read_piqa(labelled).rows] == [1, 1, 1]


def test_choices_of_truthfulqa_come_from_its_columns(folder):
    data = read_truthfulqa(folder / "truthfulqa")
    assert data.strata == ("Food", "Weather")
    first = data.rows[0]
    assert first["mc1_targets"] == {
        "choices": ["bread is fine", "bread is a planet", "It is bad"],
        "labels": [1, 0, 0],
    }
    assert first["mc2_targets"] == {
        "choices": ["bread is fine", "It is good", "bread is a planet", "It is bad"],
        "labels": [1, 1, 0, 0],
    }


def test_passages_are_whole_paragraphs_and_lose_nothing(folder):
    passages = [row["text"] for row in read_passages(folder / "text", characters=300).rows]
    assert "\n\n".join(passages) == TEXT
    assert all(len(passage) >= 300 for passage in passages[:-1])
    assert len(passages) > 3


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("gsm8k", {"question": "q"}, "line 1 of .* has no text .* as 'answer'"),
        ("gsm8k", {"question": "q", "answer": "42"}, "does not end in '#### '"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "as 'question'"),
        ("gsm8k", {"question": "x" * 100_001, "answer": "#### 1"}, "at most 100,000 characters"),
        ("mmlu", CHOICES[0] | {"choices": ["1", "2"]}, "four 'choices'"),
        ("mmlu", CHOICES[0] | {"choices": "1234"}, "four 'choices'"),
        ("mmlu", CHOICES[0] | {"answer": 4}, "has 4 as 'answer'; give a number from 0 to 3"),
        ("mmlu", CHOICES[0] | {"answer": True}, "has True as 'answer'"),
        ("piqa", PHYSICAL[0] | {"label": "x"}, "has 'x' as 'label'"),
        ("piqa", ["a"], "is not one of at most"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, name, row, said):
    file = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=said):
        LOCAL[name].read(file)


def test_files_that_are_absent_broken_or_too_large_are_refused(folder, monkeypatch):
    with pytest.raises(DataError, match="there is no file or folder"):
        read_mmlu(folder / "nowhere")
    with pytest.raises(DataError, match=r"holds 0 files TruthfulQA.csv"):
        read_truthfulqa(folder / "mmlu")
    bad = folder / "bad.jsonl"
    for content, said in ((b"", "holds no rows"), (b"{", "is not JSON"), (b"\xff\xfe", "is not UTF-8")):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_gsm8k(bad)
    (folder / "piqa" / "valid-labels.lst").write_text("0\n")
    with pytest.raises(DataError, match="has 1 labels for 3 rows"):
        read_piqa(folder / "piqa")
    table = folder / "truthfulqa" / "TruthfulQA.csv"
    table.write_text(table.read_text().replace("Best Answer", "Best"))
    with pytest.raises(DataError, match="no column 'Best Answer'"):
        read_truthfulqa(table)
    table.write_text(",".join(TRUTHS[0]) + "\n")
    with pytest.raises(DataError, match="holds 0 rows"):
        read_truthfulqa(table)
    monkeypatch.setattr(rows_module, "MOST_ROWS", 2)
    with pytest.raises(DataError, match="line 3 of"):
        read_mmlu(folder / "mmlu")
    monkeypatch.setattr(rows_module, "MOST_BYTES", 10)
    with pytest.raises(DataError, match="larger than"):
        read_mmlu(folder / "mmlu")


def test_truthfulqa_without_a_wrong_answer_is_refused(folder):
    table = folder / "truthfulqa" / "TruthfulQA.csv"
    table.write_text(table.read_text().replace("bread is a planet; It is bad", "It is good"))
    with pytest.raises(DataError, match=r"row 2 of .* has no incorrect answer"):
        read_truthfulqa(table)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gsm8=/x", "did you mean 'gsm8k'"),
        ("squad=/x", "spell it"),
        ("mmlu=", "spell it"),
        ("text", "needs its file"),
        ("../x", "is no name of a task"),
        ("", "is no name of a task"),
    ],
)
def test_tasks_that_cannot_be_are_refused(text, said):
    with pytest.raises(DataError, match=re.escape(said)):
        parse_task(text)


def test_tasks_are_spelled_with_a_path_or_come_from_the_hub(folder):
    assert parse_task("hellaswag") == TaskSource("hellaswag")
    assert read_source(parse_task(f"mmlu={folder / 'mmlu'}")) == read_mmlu(folder / "mmlu")
    with pytest.raises(DataError, match="has no files"):
        read_source(TaskSource("mmlu"))


def test_the_yaml_keeps_the_package_s_own_prompts(folder, tmp_path):
    package = tmp_path / "package"
    for stock in ("gsm8k/gsm8k.yaml", "truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/truthfulqa_mc2.yaml"):
        (package / "tasks" / stock).parent.mkdir(parents=True, exist_ok=True)
        (package / "tasks" / stock).write_text("task: x\n")
    out = tmp_path / "out"
    out.mkdir()
    source, data = TaskSource("gsm8k", folder), read_gsm8k(folder / "gsm8k")
    assert write_tasks(source, data, out, package) == {"gsm8k_local": 2}
    written = yaml.safe_load((out / "gsm8k_local.yaml").read_text())
    assert written["include"] == str(package / "tasks" / "gsm8k" / "gsm8k.yaml")
    assert set(written["dataset_kwargs"]["data_files"]) == {"test", "train"}
    assert all(path.startswith(str(out)) for path in written["dataset_kwargs"]["data_files"].values())
    assert written["dataset_kwargs"]["cache_dir"].startswith(str(out))
    assert write_tasks(source, data, out, package, shots=0) == {"gsm8k_local": 0}
    assert yaml.safe_load((out / "gsm8k_local.yaml").read_text())["training_split"] is None
    with pytest.raises(DataError, match="has 2 rows for few-shot examples, not 3"):
        write_tasks(source, data, out, package, shots=3)
    truths = read_truthfulqa(folder / "truthfulqa")
    assert write_tasks(TaskSource("truthfulqa", folder), truths, out, package, shots=3) == {
        "truthfulqa_mc1_local": 0,
        "truthfulqa_mc2_local": 0,
    }
    with pytest.raises(DataError, match=r"has no .*default_template_yaml"):
        write_tasks(TaskSource("mmlu", folder), read_mmlu(folder / "mmlu"), out, package)


def test_a_choice_is_stratified_fixed_and_nested():
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    first, more = choose(strata, 10, seed=3), choose(strata, 20, seed=3)
    assert [sum(strata[i] == name for i in first) for name in "abc"] == [6, 3, 1]
    assert set(first) < set(more)
    assert first == choose(strata, 10, seed=3) != choose(strata, 10, seed=4)
    assert choose(strata, 1000) == list(range(100))
    with pytest.raises(DataError, match="0 samples"):
        choose(strata, 0)


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=80), st.integers(1, 90), st.integers(0, 5))
def test_each_stratum_has_its_share_nearly(strata, count, seed):
    found = choose(strata, count, seed)
    assert found == sorted(set(found))
    assert len(found) == min(count, len(strata))
    for name in set(strata):
        share = len(found) * strata.count(name) / len(strata)
        assert abs(sum(strata[i] == name for i in found) - share) < 2
