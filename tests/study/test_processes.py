"""Studies in processes: side by side, as Ray tasks, and killed at ten random moments; the bytes are always the same."""

from __future__ import annotations

import io
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path
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
from deltakeeper.study.store import RunStore

KILLS = 10


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    group = {
        "name": "all",
        "recipes": ["affirmative_prefix"],
        "arms": ["bitdelta", {"merged": "bitdelta"}],
        "set": {"poison": 4, "skill": 8, "sft": {"epochs": 2, "lr": 1e-3, "batch": 4, "save_every": 0.01}},
    }
    base = write_toy_model(tmp_path_factory.mktemp("toy") / "base")
    prompts = {"held_out": 4, "contrast": 2, "passages": 2}
    value = {
        "name": "toy",
        "base": str(base),
        "seeds": [0, 1],
        "prompts": prompts,
        "groups": [group],
        "answers": {"batch": 2},
    }
    return read_study(value, "the test's study")


@pytest.fixture(scope="module")
def context():
    """Processes of their own that need not import everything anew."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["killed_run", "deltakeeper.study.run", "transformers.models.llama.modeling_llama"])
    return found


@pytest.fixture
def quick(monkeypatch, context):
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


def test_ten_kills_at_random_moments_leave_no_trace(study, alone, tmp_path, context):
    """Each run is killed by a signal that nothing can catch; the next one goes on."""

    def start(name):
        process = context.Process(target=killed_run.work, args=(study.to_text(), str(tmp_path / name)))
        process.start()
        return process

    start("warm").join()
    began = time.monotonic()
    start("whole").join()
    took = time.monotonic() - began
    assert files(tmp_path / "whole") == files(alone)
    draw = random.Random(7)
    folders, kills, met = ["killed-0"], 0, set()
    while kills < KILLS:
        process = start(folders[-1])
        process.join(draw.uniform(0.05, 0.8) * took)
        process.kill()
        process.join()
        store = RunStore(tmp_path / folders[-1])
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            met.add(sum(len(store.cell_file(key).lines) for key in store.cell_keys()))
        else:  # it was done before the signal came
            assert process.exitcode == 0
            folders.append(f"killed-{len(folders)}")
    last = start(folders[-1])
    last.join()
    assert last.exitcode == 0
    assert len(met) > 1  # the signals met it in different places
    for name in folders:
        assert files(tmp_path / name) == files(alone)
        assert not list((tmp_path / name).rglob("*.state*"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_their_study(context, tmp_path):
    path = tmp_path / "pid"
    parent = context.Process(target=killed_run.start_worker, args=(str(path),))
    parent.start()
    deadline = time.monotonic() + 50

    def until(reached):
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.02)
        return reached()

    assert until(lambda: path.is_file() and path.read_text())
    number = path.read_text()
    assert at_work(number)
    parent.kill()
    parent.join()
    assert until(lambda: not at_work(number))


def at_work(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
