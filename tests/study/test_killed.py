"""A study that is killed at ten random moments, with a signal that nothing can catch, ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time

import pytest
from killed_run import work
from toy_chat import write_toy_model

from deltakeeper.study.file import read_study
from deltakeeper.study.store import RunStore

KILLS = 10
PRELOAD = ["killed_run", "deltakeeper.study.run", "transformers.models.llama.modeling_llama"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    group = {
        "name": "all",
        "recipes": ["affirmative_prefix"],
        "arms": ["bitdelta", "svd:rank=2", {"merged": "bitdelta"}, {"quantised": "rtn:bits=4"}],
        "set": {"poison": 4, "skill": 8, "sft": {"epochs": 3, "lr": 1e-3, "batch": 4, "save_every": 0.01}},
    }
    base = write_toy_model(tmp_path_factory.mktemp("toy") / "base")
    prompts = {"held_out": 8, "contrast": 4, "passages": 2}
    value = {"name": "toy", "base": str(base), "prompts": prompts, "groups": [group], "answers": {"batch": 3}}
    return read_study(value, "the test's study").to_text()


def files(folder):
    paths = [*(folder / "cells").glob("*"), folder / "run.json", folder / "index.json"]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def test_ten_kills_leave_no_trace(text, tmp_path):
    context = multiprocessing.get_context("forkserver")  # imports once; every run is a process of its own all the same
    context.set_forkserver_preload(PRELOAD)

    def start(name):
        process = context.Process(target=work, args=(text, str(tmp_path / name)))
        process.start()
        return process

    start("warm").join()
    began = time.monotonic()
    start("whole").join()
    took = time.monotonic() - began
    assert files(tmp_path / "whole") == files(tmp_path / "warm")
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
        assert files(tmp_path / name) == files(tmp_path / "whole")
        assert not list((tmp_path / name).rglob("*.state*"))
