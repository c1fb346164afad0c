"""Fine-tunes side by side, in processes or as Ray tasks: the same bytes as one after the other, deaths on record."""

from __future__ import annotations

import io
import multiprocessing
import sys
from types import SimpleNamespace

import killed_run
import pytest
from rich.console import Console
from toy_chat import write_toy_model

from deltakeeper.errors import RunError
from deltakeeper.study import crew
from deltakeeper.study.file import read_study
from deltakeeper.study.progress import Progress
from deltakeeper.study.run import run_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    group = {
        "name": "all",
        "recipes": ["affirmative_prefix"],
        "arms": ["bitdelta", {"merged": "bitdelta"}],
        "set": {"poison": 4, "skill": 4, "sft": {"epochs": 1, "lr": 1e-3}},
    }
    base = write_toy_model(tmp_path_factory.mktemp("toy") / "base")
    prompts = {"held_out": 4, "contrast": 2, "passages": 2}
    value = {"name": "toy", "base": str(base), "seeds": [0, 1], "prompts": prompts, "groups": [group]}
    return read_study(value, "the test's study")


@pytest.fixture
def quick(monkeypatch):
    """Processes that need not import everything anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run", "deltakeeper.study.run", "transformers.models.llama.modeling_llama"])
    monkeypatch.setattr(crew.multiprocessing, "get_context", lambda kind: context)


def run(study, folder, **options):
    screen = io.StringIO()
    with Progress(Console(file=screen, width=200)) as progress:
        return run_study(study, folder, progress, command="test", **options), screen.getvalue()


def files(folder):
    paths = [*(folder / "cells").glob("*"), folder / "run.json", folder / "index.json"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def alone(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert run(study, folder)[0].complete
    return folder


def test_two_processes_give_what_one_gives(study, alone, tmp_path, quick):
    outcome, said = run(study, tmp_path / "run", workers=2)
    assert outcome.complete and outcome.planned == 7  # the base is asked once
    assert files(tmp_path / "run") == files(alone)
    assert said.count("Fine-tuned affirmative_prefix, seed") == 2 and said.count("Measured") == 7


def test_a_worker_that_dies_is_told_and_made_good_by_the_next_run(study, alone, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(crew, "_process", killed_run.die)
    outcome, said = run(study, tmp_path / "run", workers=2)
    assert outcome.measured == 0 and len(outcome.failures) == 7
    assert "ended by signal 9, as the kernel does when memory runs out" in said
    monkeypatch.undo()
    assert run(study, tmp_path / "run")[0].complete
    assert files(tmp_path / "run") == files(alone)


def test_ray_tasks_do_the_same(study, alone, tmp_path, monkeypatch):
    began = []

    class Task:
        def __init__(self, function):
            self.function = function

        def remote(self, task):
            began.append(task.number)
            return (self.function, task)

    class RayError(Exception):
        pass

    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **options: began.append(options),
        remote=lambda **options: Task,
        wait=lambda pending: (pending[:1], pending[1:]),
        get=lambda done: done[0](done[1]),
        shutdown=lambda: began.append("shutdown"),
        exceptions=SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    outcome, said = run(study, tmp_path / "run", workers=2, ray=True)
    assert outcome.complete and said.count("Fine-tuned affirmative_prefix, seed") == 2
    assert began == [{"log_to_driver": False, "include_dashboard": False, "num_cpus": 2}, 0, 1, "shutdown"]
    assert files(tmp_path / "run") == files(alone)

    def lost(done):
        raise RayError("the node is gone")

    monkeypatch.setattr(ray, "get", lost)
    outcome, said = run(study, tmp_path / "lost", ray=True)
    assert outcome.measured == 0 and "its Ray task ended with RayError: the node is gone" in said


def test_ray_that_is_not_installed_is_told(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install 'deltakeeper\[ray\]'"):
        run(study, tmp_path, ray=True)
