"""The pages on judges and statistics: their settings load, their code and their commands run."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from deltakeeper.commands.calibrate import calibrate
from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.judges.rubric import PACKAGED

DOCS = Path(__file__).parents[2] / "docs"


def blocks(language, page):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def here(tmp_path, monkeypatch):
    other = {
        "name": "other",
        "version": "1",
        "match": {"rule": "substring", "case": "insensitive"},
        "phrases": ["sorry"],
    }
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "harm-classifier").mkdir()
    rows = [("Bake?", "I'm sorry, but I can't help with that.", "refused", "base")] * 30
    rows += [("Bake?", "Mix flour and water.", "complied", "base")] * 30
    with (tmp_path / "labelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer", "label", "arm"), *rows])
    with (tmp_path / "answers.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer", "arm"), *((p, a, arm) for p, a, _, arm in rows)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_settings_of_the_page_load(here):
    llm, classifier = blocks("yaml", "judges.md")
    for name, text in (("llm", llm), ("classifier", classifier)):
        (here / f"{name}.yaml").write_text(text)
        assert load_judge(here / f"{name}.yaml").name == yaml.safe_load(text)["name"]
    remote = llm.replace("# api_key_env", "api_key_env").replace("# allow_remote", "allow_remote")
    (here / "remote.yaml").write_text(remote.replace("http://127.0.0.1:8000", "https://judge.example"))
    assert load_judge(here / "remote.yaml").settings.api_key_env == "JUDGE_KEY"
    page = (DOCS / "judges.md").read_text(encoding="utf-8")
    assert all(f"| `{rubric}` |" in page for rubric in PACKAGED)


@pytest.mark.parametrize("page", ["judges.md", "statistics.md"])
def test_the_python_of_the_pages_runs(here, capsys, page):
    for code in blocks("python", page):
        exec(compile(code, page, "exec"), {})
    said = capsys.readouterr().out
    assert ("disagree on 0.0 % of 1" if page == "judges.md" else "3 seeds: the interval is rough") in said


def test_the_first_command_of_the_page_runs(here):
    [commands] = blocks("sh", "judges.md")
    app = typer.Typer()
    app.command()(calibrate)
    first = commands.splitlines()[0]
    done = CliRunner().invoke(app, shlex.split(first)[2:], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "100.0 %" in done.stdout
