"""Docs that cannot rot: generated pages are up to date, README's code runs, and the public names are all there."""

from __future__ import annotations

import gc
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import deltakeeper
from deltakeeper import cli, compress
from deltakeeper.kernels import held_terms
from deltakeeper.testing import write_pair
from deltakeeper.testing.models import write_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_make_docs_would_write():
    for path, text in generator().pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run `make docs`: {path.name} is stale"


def blocks(language, page="README.md"):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture
def here(tmp_path, monkeypatch):
    base, _ = write_pair("llama", tmp_path)
    write_tokenizer(base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_commands(monkeypatch):
    def run(lines):
        for line in lines.splitlines():
            monkeypatch.setattr("sys.argv", shlex.split(line))
            with pytest.raises(SystemExit) as exit_:
                cli.main()
            assert not exit_.value.code, line

    return run


def test_the_python_of_the_readme_runs(here, capsys):
    [code] = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "times smaller" in capsys.readouterr().out
    assert (here / "tuned-again" / "model.safetensors").is_file()


def test_the_commands_of_the_readme_run(here, run_commands):
    [_make, compress_, serve, _study, look] = blocks("sh")
    run_commands(compress_ + serve + look)
    assert (here / "tuned-again" / "model.safetensors").is_file()
    assert (here / "lens" / "lens.html").is_file()


def test_the_study_of_the_readme_is_planned_and_its_readers_want_a_run(monkeypatch, tmp_path, run_commands, capsys):
    """The study itself runs in tests/study; its other commands are asked before it ran."""
    study, *readers = blocks("sh")[3].splitlines()
    monkeypatch.chdir(ROOT)
    command = study.split("#")[0].replace("runs/synthetic", str(tmp_path / "run"))
    run_commands(f"{command} --dry-run")
    assert "synthetic" in capsys.readouterr().out
    for line in readers:
        monkeypatch.setattr("sys.argv", shlex.split(line.replace("runs/synthetic", str(tmp_path / "run"))))
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert "run a study" in capsys.readouterr().err, line


@pytest.fixture
def deltas(here):
    """What docs/serving.md serves: a tenant, another version of it, and questions."""
    compress("base", "tuned", "deltas/support", "bitdelta")
    compress("base", "tuned", "support-2", "bitdelta:bits=2")
    (here / "questions.jsonl").write_text('{"prompt": "w1 w2", "tenant": "support"}\n{"prompt": "w3"}\n')


def test_the_python_of_the_page_on_serving_runs(deltas, capsys):
    [code] = blocks("python", "docs/serving.md")
    gc.collect()  # what earlier tests left in cycles is not the page's
    before = held_terms()
    names = {}
    exec(compile(code, "serving.md", "exec"), names)
    assert capsys.readouterr().out.splitlines()[0].endswith(("(length)", "(stop)"))
    assert names["store"].stats().evictions == {"replaced": 1, "closed": 1}
    assert held_terms() == before


def test_the_commands_of_the_page_on_serving_run(deltas, run_commands, capsys):
    [commands] = blocks("sh", "docs/serving.md")
    run_commands(commands)
    assert "The tenants are served at" in capsys.readouterr().out


def test_public_names_are_exactly_what_is_exported():
    exported = {n for n in vars(deltakeeper) if not n.startswith("_")} | {"__version__"}
    submodules = {n for n in exported if f"deltakeeper.{n}" in __import__("sys").modules}
    assert exported - submodules | {"compress", "verify", "fingerprint", "heal"} == set(deltakeeper.__all__)
    assert all(getattr(deltakeeper, name).__doc__ for name in deltakeeper.__all__ if name[0].islower())


def test_no_page_promises_the_synthetic_study_in_seconds():
    for page in ("README.md", "CONTRIBUTING.md", "docs/study.md", "studies/synthetic.yaml"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "a minute or two" in text, page
        assert not re.search(r"in seconds|# seconds|CI, seconds", text), page


def test_every_relative_link_and_picture_exists():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
