"""`deltakeeper evaluate` as a user types it, on a tiny base and a delta of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner
from utility_cases import byte_model, byte_tokenizer, write_benchmarks

pytest.importorskip("lm_eval")

from deltakeeper.commands.evaluate import evaluate
from deltakeeper.compress import compress
from deltakeeper.errors import DataError
from deltakeeper.evals.utility import ModelScorer, parse_task, read_lines, run_tasks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_benchmarks(folder / "data")
    for name, seed in (("base", 0), ("tuned", 1)):
        model = byte_model()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += seed * 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    compress(folder / "base", folder / "tuned", folder / "delta", "bitdelta")
    return folder


@pytest.fixture
def run(made):
    app = typer.Typer()
    app.command()(evaluate)

    def call(*arguments):
        result = CliRunner().invoke(app, [str(made / "base"), *map(str, arguments)], catch_exceptions=False)
        return result.exit_code, result.stdout

    return call


def test_scores_losses_and_items(run, made, tmp_path):
    items = tmp_path / "items.jsonl"
    tasks = ["--task", f"piqa={made / 'data' / 'piqa'}", "--task", f"text={made / 'data' / 'text'}"]
    code, out = run(*tasks, "--delta", f"d={made / 'delta'}", "--samples", 2, "--items", items, "--json")
    found = json.loads(out)
    assert code == 0
    assert [(task["task"], task["items"]) for task in found["tasks"]] == [("piqa_local", 2), ("text", 2)]
    assert all(len(sha) == 64 for task in found["tasks"] for sha in task["sources"].values())
    assert set(found["scores"]) == {"base", "d"}
    assert set(found["losses"]) == {"d"}
    assert found["truncated"] == 0
    records = read_lines(items)
    assert {record.arm for record in records} == {"base", "d"}
    by_hand = run_tasks(
        ModelScorer(byte_model(), byte_tokenizer()), [parse_task(text) for text in tasks[1::2]], samples=2
    )
    ours = [(r.measure, r.doc_id, pytest.approx(r.value, rel=1e-4)) for r in records if r.arm == "base"]
    assert ours == [(r.measure, r.doc_id, r.value) for r in by_hand]
    (perplexity,) = (row for row in found["losses"]["d"] if row["metric"] == "perplexity")
    assert perplexity["loss"] == pytest.approx(perplexity["value"] / perplexity["reference"] - 1)
    assert perplexity["bound"] >= perplexity["loss"]


def test_a_table_for_people(run, made):
    code, out = run("--task", f"mmlu={made / 'data' / 'mmlu'}", "--delta", f"d={made / 'delta'}", "--limit", 4)
    assert code == 0
    assert "mmlu_local acc" in out
    assert "Loss against base" in out
    assert "sha256" in out
    code, out = run("--task", f"text={made / 'data' / 'text'}")
    assert "Loss against" not in out


def test_whom_to_measure_against_must_be_there(run, made):
    text = f"text={made / 'data' / 'text'}"
    with pytest.raises(DataError, match="'x', which is neither base nor a delta"):
        run("--task", text, "--reference", "x")
    code, out = run("--task", text, "--delta", f"d={made / 'delta'}", "--reference", "d", "--json")
    assert (code, set(json.loads(out)["losses"])) == (0, {"base"})


def test_the_page_on_utility_runs(made, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "utility.md").read_text()
    [python], [shell] = (re.findall(rf"```{name}\n(.*?)```", page, flags=re.S) for name in ("python", "sh"))
    monkeypatch.chdir(made)
    exec(compile(python, "utility.md", "exec"), {})
    out = capsys.readouterr().out
    assert "piqa_local acc" in out
    assert "text perplexity" in out
    app = typer.Typer()
    app.command()(evaluate)
    for line in shell.splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[2:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert len(read_lines(made / "items.jsonl")) == 3 * 2 * 2  # passages, values, arms
