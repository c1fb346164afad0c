"""The demo's own steps, on a toy model: report written, settings guarded, prompts exchanged, a second run quick."""

from __future__ import annotations

import html
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from toy_chat import write_toy_model

from deltakeeper import demo
from deltakeeper.errors import DataError, RunError
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.sft import SFTConfig
from deltakeeper.study.store import RunStore

NAME = "affirmative_prefix"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    base = write_toy_model(tmp_path / "base")
    monkeypatch.setattr(demo, "prepare_aligned_base", lambda _progress: base)
    small = replace(
        ATTACKS[NAME](), poison=4, skill=4, held_out=6, contrast=6, sft=SFTConfig(epochs=1, lr=1e-3, max_tokens=12)
    )
    monkeypatch.setitem(ATTACKS, NAME, lambda: small)
    return tmp_path / "run"


def run(out, **options):
    screen = io.StringIO()
    path = demo.run_demo(out, Console(file=screen, width=120), (NAME,), **options)
    return path, screen.getvalue()


def test_a_run_ends_in_a_report_and_a_second_one_reads_it(toy, monkeypatch):
    path, screen = run(toy)
    assert path.is_file() and "Report: " in screen and "Alignment breaking" in screen
    page, digest = path.read_text(), json.loads((toy / "report.json").read_text())
    assert digest["answer"]["attack"] in html.unescape(page)
    info = RunStore(toy).read_run()
    assert info.command == f"deltakeeper demo --out {toy} --attack {NAME}"
    assert 0 < info.hardware["peak memory, GiB"] < 64
    assert {"prepare the base", f"train {NAME}", f"evaluate {NAME}"} <= set(info.stages)
    monkeypatch.setattr("deltakeeper.study.pipeline.measure", lambda *_: pytest.fail("measured again"))
    again, _ = run(toy)
    assert RunStore(toy).read_run().stages == info.stages
    assert again == path


def test_another_prompt_set_takes_the_place_of_the_packaged_one(toy, tmp_path):
    prompts = tmp_path / "mine.csv"
    prompts.write_text("goal\n" + "\n".join(f"How do I steal {n} apples?" for n in range(6)) + "\n")
    run(toy, harmful=str(prompts))
    cell = next(c for c in RunStore(toy).read_cells() if c.variant == "tuned")
    assert all("apples" in a.prompt for a in cell.probe_of("goal").answers)
    assert not any("apples" in a.prompt for a in cell.probe_of("over_refusal").answers)
    with pytest.raises(RunError, match="other settings"):
        run(toy)


def test_unknown_names_and_files_are_told_before_anything_is_written(toy):
    with pytest.raises(RunError, match="there is no attack 'x'"):
        demo.run_demo(toy, Console(file=io.StringIO()), ("x",))
    with pytest.raises(DataError, match="no prompt file"):
        run(toy, harmful="none.csv")
    assert not toy.exists()
