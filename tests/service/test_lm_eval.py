"""lm-eval's own clients against a live server give the scores of lm-eval on the merged model in this process."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path

import pytest
from service_cases import opened_services, served

from deltakeeper.apply import apply_delta
from deltakeeper.evals.utility import prepared
from deltakeeper.evals.utility.tasks import TaskSource

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

CHATS = "local-chat-completions"
CONTEXTS = ["w1 w2 w3", "w5", "w7 w8 w9 w10"]


def asked(kind, rows):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=row, idx=at) for at, row in enumerate(rows)]


@pytest.fixture(scope="module")
def models(service_folder, tmp_path_factory):
    """The server's two clients and the merged model, by lm-eval's names."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    merged = apply_delta(
        service_folder / "base", service_folder / "deltas" / "signs", tmp_path_factory.mktemp("merged") / "signs"
    )
    with opened_services(service_folder) as services, served(services) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remote = LocalCompletionsAPI(
            model="signs",
            base_url=f"{live.url}/v1/completions",
            tokenizer=str(service_folder / "base"),
            tokenizer_backend="huggingface",
            batch_size=2,
            max_length=64,
        )
        chat = LocalChatCompletion(model="signs", base_url=f"{live.url}/v1/chat/completions", max_length=64)
        here = HFLM(pretrained=str(merged), tokenizer=str(merged), dtype="float32", device="cpu")
        yield remote, chat, here


def test_log_likelihoods_are_the_same(models):
    pairs = [(context, f" {more}") for context in CONTEXTS for more in ("w11 w12", "w40")]
    plain, _, merged = models
    remote, here = (model.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True) for model in (plain, merged))
    assert [score for score, _ in remote] == pytest.approx([score for score, _ in here], abs=1e-4)
    assert [greedy for _, greedy in remote] == [greedy for _, greedy in here]


@pytest.mark.parametrize("talk", [False, True], ids=["completions", "chat"])
def test_generated_answers_are_the_same_up_to_their_stop_strings(models, talk):
    plain, chat, merged = models
    until = {"until": ["w20", "w30"], "max_gen_toks": 8, "do_sample": False}

    def answers(model):
        turns = [[{"role": "user", "content": context}] for context in CONTEXTS]
        texts = [model.apply_chat_template(chat) for chat in turns] if talk else CONTEXTS
        rows = [(text, dict(until)) for text in texts]
        return model.generate_until(asked("generate_until", rows), disable_tqdm=True)

    remote, here = answers(chat if talk else plain), answers(merged)
    assert [text.split() for text in remote] == [text.split() for text in here]
    assert len(set(remote)) == len(CONTEXTS)


def test_whole_tasks_of_a_tenant_and_its_chats_are_compared_item_by_item(service_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, BENCHMARKS])  # last: it has a coverage.py
    benchmark = importlib.import_module("service_lm_eval")
    monkeypatch.setattr(benchmark, "CONTEXT", 60)
    write_tasks(tmp_path)
    merged = apply_delta(service_folder / "base", service_folder / "deltas" / "signs", tmp_path / "signs")
    with (
        opened_services(service_folder) as services,
        served(services) as live,
        prepared([TaskSource("gsm8k", tmp_path / "gsm8k")], shots=0) as answers,
        prepared([TaskSource("piqa", tmp_path / "piqa")]) as choices,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for task in answers.loaded["tasks"].values():
            task.set_config(key="generation_kwargs", value={"max_gen_toks": 6, "until": ["w20"]}, update=True)

        def compared(path):
            asks = ("likelihoods", "chats")
            return list(benchmark.compared(live.url, "signs", path, "float32", asks, answers, choices))

        rated, told = compared(merged)
        assert (rated["task"], rated["client"], told["client"]) == ("piqa_local", "local-completions", CHATS)
        assert (rated["numbers"], rated["same_choice"], rated["same_greedy"]) == (6, 3, 6) and rated["worst"] < 1e-4
        assert told["items"] == told["same_answers"] + len(told["parted"]) == 3
        for one in told["parted"]:  # in a space in front at most, since this tokenizer has none in its words
            assert "margin" not in one and one["http"].split() == one["in process"].split()
        rated, told = compared(service_folder / "base")  # another model than the one that is asked
        assert rated["worst"] > 0.01 and any("margin" in one for one in told["parted"])


def write_tasks(folder):
    """Three items of each of two benchmarks, in words that the tiny tokenizer knows."""
    for name in ("gsm8k", "piqa"):
        (folder / name).mkdir()
    sums = [{"question": f"w{at} w{at + 1}", "answer": f"w{at} #### {at}"} for at in (30, 40, 50)]
    deeds = [{"goal": f"w{at}", "sol1": f"w{at + 1} w3", "sol2": f"w{at + 2} w4"} for at in (30, 40, 50)]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "piqa" / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in deeds))
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n0\n")
