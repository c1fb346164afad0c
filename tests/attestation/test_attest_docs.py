"""The pages on advice and attestations: their commands run, and what they show is what is said."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from study_runs import run_cells, write_run
from typer.testing import CliRunner

from deltakeeper import compress
from deltakeeper.advice import Advice, advise
from deltakeeper.artifact import open_artifact
from deltakeeper.commands.advise import advise as advise_verb
from deltakeeper.commands.attest import attest as attest_verbs
from deltakeeper.commands.report import report as report_verb
from deltakeeper.errors import DataError, RunError
from deltakeeper.testing import write_pair

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def blocks(language, page):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    here = tmp_path_factory.mktemp("documented")
    base, tuned = write_pair("llama", here)
    compress(base, tuned, here / "delta", "bitdelta")
    sha = open_artifact(here / "delta").manifest_sha256
    cells = [
        replace(c, artifact=sha) if (c.attack, c.variant, c.seed) == ("trigger", "good", 0) else c
        for c in run_cells(attacks={"prefix": "alignment", "trigger": "backdoor"}, seeds=(0, 1))
    ]
    write_run(here / "runs" / "embedded", cells)
    return here


@pytest.fixture
def here(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


@pytest.fixture
def run():
    app = typer.Typer()
    app.command("advise")(advise_verb)
    app.command("report")(report_verb)
    app.add_typer(attest_verbs)

    def call(line):
        words = shlex.split(line)
        return CliRunner().invoke(app, words[1:] if words[0] == "deltakeeper" else words)

    return call


def test_the_commands_of_the_page_on_advice_run(here, run):
    [commands] = blocks("sh", "advise.md")
    for line in commands.splitlines():
        done = run(line)
        assert done.exit_code == 0, done.output
    advice = Advice.model_validate_json(done.stdout)
    assert advice.pick == "good" and advice.families == ("backdoor",)
    assert "Use good" in run("deltakeeper advise runs/embedded").output


def test_the_sentence_on_the_page_is_what_is_said():
    [shown] = blocks("text", "advise.md")
    assert advise(run_cells()).sentence == shown.strip()


def test_terms_that_make_no_sense_and_absent_families_are_refused(here, run):
    assert isinstance(run("advise runs/embedded --max-loss 2").exception, DataError)
    assert isinstance(run("advise runs/embedded --family hallucination").exception, RunError)


def test_commands_and_code_of_the_page_on_attestations_run(here, run, capsys):
    [commands] = blocks("sh", "attestation.md")
    for line in commands.splitlines():
        done = run(line)
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert done.output.startswith("It holds. ") and "trigger, good, seeds 0: attack 0.04" in done.output
    [code] = blocks("python", "attestation.md")
    exec(compile(code, "attestation.md", "exec"), {})
    assert capsys.readouterr().out.startswith("trigger: 0.04 (")


def test_verify_says_what_does_not_hold_and_exits_with_one(here, run, tmp_path):
    run(f"attest keygen -o {tmp_path}/k.pem")
    signed = run(f"attest sign runs/embedded --variant good --key {tmp_path}/k.pem -o {tmp_path}/s.json")
    assert signed.exit_code == 1 and "no longer holds the artifact" in str(signed.exception)
    signed = run(f"attest sign runs/embedded delta --key {tmp_path}/k.pem -o {tmp_path}/s.json --json")
    assert json.loads(signed.stdout)["predicate"]["measurement"]["attack"] == "trigger"
    shutil.copytree(here / "delta", tmp_path / "delta")
    check = f"attest verify {tmp_path}/s.json --artifact {tmp_path}/delta --public-key {tmp_path}/k.pem.pub"
    assert run(f"{check} --base base").exit_code == 0
    wrong = run(f"{check} --base tuned")
    assert wrong.exit_code == 1 and "Refused: " in wrong.output and "the base here is" in wrong.output
    (tmp_path / "delta" / "more.txt").write_text("x")
    machine = run(f"{check} --json")
    assert machine.exit_code == 1 and "more.txt is not among" in json.loads(machine.stdout)["reason"]
    assert isinstance(run(f"{check} --max-age soon").exception, DataError)
