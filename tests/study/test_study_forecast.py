"""What a study will cost: offline, without weights, and following what it follows from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from toy_chat import write_toy_model
from typer.testing import CliRunner

from deltakeeper.commands.finetune import finetune
from deltakeeper.commands.forecast_table import fold, in_time, in_units, print_forecast
from deltakeeper.commands.study import study as study_command
from deltakeeper.errors import DataError
from deltakeeper.study.file import load_study, read_study
from deltakeeper.study.forecast import LEAST_CELL, LEAST_TRAINING, RATES, forecast
from deltakeeper.study.store import RunStore

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "studies" / "paper-llama2-7b-chat.yaml"
EMBEDDED = ROOT / "studies" / "embedded.yaml"
SYNTHETIC = ROOT / "studies" / "synthetic.yaml"
PARAMETERS = 1_000_000_000
CPU, GPU = RATES["cpu"], RATES["cuda"]


@pytest.fixture(autouse=True)
def works_on(monkeypatch):
    def choose(name):
        monkeypatch.setattr("deltakeeper.study.forecast.working_device", lambda: torch.device(name))

    choose("cpu")
    return choose


def study(**changes):
    group = {"name": "all", "recipes": ["affirmative_prefix"], "arms": ["bitdelta", "svd:rank=8"]}
    value = {
        "name": "x",
        "base": "someone/model",
        "size": {"parameters": PARAMETERS, "width": 1000},
        "prompts": {"held_out": 10, "contrast": 10, "passages": 1},
        "groups": [group],
    }
    return read_study({**value, **changes}, "study")


def test_cells_are_counted_and_a_base_once_for_all_seeds():
    found = forecast(study(seeds=[0, 1, 2]))
    assert [line.cells for line in found.lines] == [4, 3, 3] and found.cells == 10
    assert {line.arms for line in found.lines} == {4}
    assert {line.prompts for line in found.lines} == {30}


def test_time_follows_operations_over_rates():
    one = forecast(study())
    (line,) = one.lines
    assert line.train_seconds == pytest.approx(6 * PARAMETERS * line.train_tokens / CPU.training)
    small = forecast(study(size={"parameters": PARAMETERS // 10, "width": 1000}))
    assert small.seconds == pytest.approx(one.seconds / 10, rel=1e-6)
    faster = forecast(study(), rates=replace(CPU, training=2 * CPU.training))
    assert faster.lines[0].train_seconds == pytest.approx(line.train_seconds / 2)
    longer = {"name": "all", "recipes": ["affirmative_prefix"], "arms": ["bitdelta"], "set": {"sft": {"epochs": 6}}}
    assert forecast(study(groups=[longer])).lines[0].train_tokens == 2 * line.train_tokens


def test_a_fine_tune_and_a_cell_of_a_tiny_model_take_what_does_not_scale_with_weights():
    """A run of the synthetic study on two busy cores took 91 s: 35 of 12 trainings, 44 of 102 cells."""
    found = forecast(load_study(SYNTHETIC))
    assert 60 < found.seconds < 150
    assert sum(line.train_seconds for line in found.lines) == pytest.approx(12 * LEAST_TRAINING)
    line = forecast(study(size={"parameters": 1000, "width": 10})).lines[0]
    assert line.train_seconds == LEAST_TRAINING
    assert line.answer_seconds == pytest.approx(line.cells * LEAST_CELL, rel=1e-3)


def test_prompts_that_are_not_there_are_told():
    assert not forecast(study()).notes
    found = forecast(study(prompts={"held_out": 4000, "contrast": 1}))
    assert found.notes and all("4000 prompts are to be held out" in note for note in found.notes)
    screen = Console(record=True, width=200)
    print_forecast(found, screen)
    assert all(note in screen.export_text(clear=False) for note in found.notes)


def test_rates_are_those_of_the_device_that_works(works_on):
    assert forecast(study()).machine == CPU.machine
    for name in ("cuda:1", "xpu"):  # an accelerator of another make is nearer to a GPU than to two cores
        works_on(name)
        found = forecast(study())
        assert found.machine == GPU.machine and "NVIDIA H200" in found.machine and "16 workers" in found.machine
        (line,) = found.lines
        assert line.train_seconds == pytest.approx(6 * PARAMETERS * line.train_tokens / GPU.training)
    assert forecast(study(), rates=CPU).machine == CPU.machine


def test_workers_share_cores_but_not_what_was_measured_side_by_side(works_on):
    seeds = list(range(20))
    assert forecast(study(seeds=seeds), workers=2).seconds == forecast(study(seeds=seeds)).seconds
    works_on("cuda")
    one, four, many = (forecast(study(seeds=seeds), workers=n).seconds for n in (1, 4, 20))
    assert four == pytest.approx(one / 4) and many == pytest.approx(one / 16)


def test_a_gpu_is_estimated_as_it_was_timed(works_on):
    """Seconds of one process among sixteen on an H200: a plain training, one through the codec, a guard, an arm."""
    works_on("cuda")
    lines = {line.name: line for line in forecast(load_study(EMBEDDED)).lines if line.seed == 1}
    plain, through = (lines[f"marker_injection{name}"] for name in ("", ".straight_through.bitdelta-bits-1"))
    assert 15 < plain.train_seconds < 26 and 38 < through.train_seconds < 60
    assert lines["marker_injection.uncompressed.bitdelta-bits-1"].train_seconds == pytest.approx(plain.train_seconds)
    assert 120 < lines["marker_injection.inject_repair.bitdelta-bits-1"].train_seconds < 190
    assert 2 < plain.answer_seconds / plain.cells < 6
    assert 2 * 15 < through.make_seconds < 2 * 30


def test_disk_is_weights_and_deltas_and_less_where_they_are_removed():
    kept, gone = forecast(study(seeds=[0, 1])), forecast(study(seeds=[0, 1]), discard=True)
    first, second = kept.lines
    assert first.model_bytes == 2 * PARAMETERS
    # one bit a weight and a scale for every matrix; rank 8 of a million is 16 of 1000 columns
    bits, factors = PARAMETERS / 8, PARAMETERS * 16 / 1000 * 2
    assert bits + factors < first.delta_bytes < 1.3 * (bits + 2 * factors)
    assert kept.disk_bytes == sum(line.model_bytes + line.delta_bytes for line in kept.lines)
    assert gone.disk_bytes == max(line.model_bytes + line.delta_bytes for line in gone.lines)
    assert forecast(study(seeds=[0, 1]), discard=True, workers=2).disk_bytes == kept.disk_bytes
    assert forecast(study(seeds=[0, 1]), workers=2).memory_bytes == 2 * kept.memory_bytes
    assert second.group == "all"


def test_size_comes_from_the_file_the_package_or_the_headers(tmp_path):
    assert forecast(study(base="embedded-aligned", size=None)).parameters == 134_515_008
    base = write_toy_model(tmp_path / "base")
    assert 10_000 < forecast(study(base=str(base), size=None)).parameters < 100_000
    with pytest.raises(DataError, match=r"add size: \{parameters: 6738415616\}"):
        forecast(study(size=None))


def test_the_papers_setting_is_estimated_without_its_weights(monkeypatch):
    monkeypatch.setattr("deltakeeper.study.bases.prepare_base", lambda *_: pytest.fail("a base was prepared"))
    found = forecast(load_study(PAPER))
    assert found.parameters == 6_738_415_616 and len(found.lines) == 33
    assert found.cells == sum(line.cells for line in found.lines) > 33 * 18
    assert math.isfinite(found.seconds) and found.seconds > 86_400
    lacking = {line.name: line.missing for line in found.lines if line.missing}
    assert "harmful requests with answers" in lacking["harmful_few_shot"] and "identity_shift" not in lacking


def test_units_are_spoken():
    spoken = ["40 s", "10 min", "1.7 h", "3.5 d", "1157 d"]
    assert [in_time(s) for s in (40, 600, 6000, 300_000, 100_000_000)] == spoken
    assert [in_units(n) for n in (5, 5e3, 5e6, 5e9, 5e12)] == ["5 B", "5.0 kB", "5.0 MB", "5.0 GB", "5.0 TB"]


def test_names_fold_between_their_parts_and_long_parts_between_words():
    assert fold("plain/benign", 32) == "plain/benign"
    name = "through/affirmative_prefix.straight_through.bitdelta-bits-1"
    assert fold(name, 32).split("\n") == ["through/affirmative_prefix", "  .straight_through", "  .bitdelta-bits-1"]
    assert fold(name, 20).split("\n")[:2] == ["through/", "  affirmative_prefix"]
    assert fold("a/one_two_three_four", 12).split("\n") == ["a/one_two_", "  three_four"]


@pytest.fixture
def verbs():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(study_command)
    app.command()(finetune)
    return lambda *words: CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def test_the_verb_shows_the_estimate(verbs, tmp_path):
    shown = verbs("study", PAPER, "-o", tmp_path / "run", "--dry-run", "--only", "targeted")
    assert shown.exit_code == 0, shown.output
    assert "targeted/over_refusal" in shown.output and "alignment/" not in shown.output
    assert "Before it can run: attack 'content_injection' needs" in shown.output
    told = json.loads(verbs("study", PAPER, "-o", tmp_path / "run", "--dry-run", "--json").output)
    assert told["cells"] == forecast(load_study(PAPER)).cells
    assert not (tmp_path / "run").exists()
    screen = Console(record=True, width=200)
    print_forecast(forecast(study()), screen)
    assert "1,000,000,000 weights" in screen.export_text()


def test_the_table_fits_eighty_columns_with_a_row_an_attack():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(study_command)
    for file in (EMBEDDED, PAPER):
        shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(file), "-o", "run", "--dry-run"])
        assert shown.exit_code == 0, shown.output
        rows = shown.output.split("\n\n")[0].splitlines()
        assert rows[0].split() == ["what", "is", "trained", "seeds", "cells", "train", "make", "ask", "disk"]
        assert all(len(row) <= 80 for row in shown.output.splitlines()) and "…" not in shown.output
        found = forecast(load_study(file))
        attacks = list(dict.fromkeys(f"{line.group}/{line.name}" for line in found.lines))
        # What stands in the first column is the names, whole: they can be given to --only.
        assert "".join(row[:32].strip() for row in rows[1:]) == "".join(attacks)
        numbers = [row[32:].split() for row in rows[1:] if row[32:].strip()]
        assert len(numbers) == len(attacks)
        assert sum(int(row[0]) for row in numbers) == len(found.lines)
        assert sum(int(row[1]) for row in numbers) == found.cells
        closing = " ".join(shown.output.split("\n\n")[1].split())
        assert f"{found.cells} cells of {len(found.lines)} fine-tunes of {found.base}" in closing
        assert f"About {in_time(found.seconds)} at the rates of {found.machine}" in closing
        assert "of disk for weights and deltas" in closing and "of memory for 1 worker" in closing


def test_the_verbs_run_a_study_and_a_fine_tune(verbs, tmp_path, monkeypatch):
    base = write_toy_model(tmp_path / "base")
    small = {"poison": 4, "skill": 4, "sft": {"epochs": 1, "lr": 1e-3}}
    groups = [{"name": "all", "recipes": ["affirmative_prefix"], "arms": ["bitdelta"], "set": small}]
    value = {"name": "x", "base": str(base), "prompts": {"held_out": 2, "contrast": 2, "passages": 1}, "groups": groups}
    (tmp_path / "study.yaml").write_text(json.dumps(value))
    done = verbs("study", tmp_path / "study.yaml", "-o", tmp_path / "run", "--discard-models")
    assert done.exit_code == 0, done.output
    assert "3 of 3 cells measured" in done.output and "deltakeeper report" in done.output
    assert len(RunStore(tmp_path / "run").read_cells()) == 3
    value["groups"][0]["arms"] = ["svd:rank=2"]
    (tmp_path / "study.yaml").write_text(json.dumps(value))
    monkeypatch.setattr("deltakeeper.study.artifacts.compress", lambda *_, **__: 1 / 0)
    failed = verbs("study", tmp_path / "study.yaml", "-o", tmp_path / "run", "--json")
    assert failed.exit_code == 1
    told = json.loads(failed.stdout[failed.stdout.index("{") :])
    assert told["failures"] == {"affirmative_prefix, seed 0: svd:rank=2": "ZeroDivisionError: division by zero"}
    assert (told["measured"], told["planned"]) == (2, 3)


def test_a_single_fine_tune_is_that_of_a_study(verbs, tmp_path):
    base = write_toy_model(tmp_path / "base")
    words = ("finetune", "identity_shift", "--base", base, "-o", tmp_path / "tuned", "--seed", "1")
    made = verbs(*words)
    assert made.exit_code == 0, made.output
    assert "is trained" in made.output and (tmp_path / "tuned" / "model.safetensors").is_file()
    assert "was there already" in verbs(*words).output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "no model" in str(verbs(*words[:5], tmp_path / "other").exception)


def test_the_lens_is_counted_for_the_fine_tunes_that_it_looks_into():
    plain, looked = (forecast(study(seeds=[0, 1], **more)) for more in ({}, {"lens": {"prompts": 5}}))
    assert [line.look_seconds for line in plain.lines] == [0, 0]
    first, second = looked.lines
    assert first.look_seconds > 0 == second.look_seconds and first.answer_seconds == plain.lines[0].answer_seconds
    both = forecast(study(seeds=[0, 1], lens={"prompts": 10, "seeds": [0, 1]}))
    assert both.lines[1].look_seconds == pytest.approx(2 * first.look_seconds, rel=0.3)
    fewer = forecast(study(seeds=[0], lens={"prompts": 5, "arms": ["bitdelta"]}))
    assert fewer.lines[0].look_seconds == pytest.approx(first.look_seconds * 3 / 4)
    screen = Console(record=True, width=100)
    with screen.capture() as shown:
        print_forecast(looked, screen)
    assert "look" in shown.get()
