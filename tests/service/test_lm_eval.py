"""lm-eval's own clients against a live server give the scores of lm-eval on the merged model in this process."""

from __future__ import annotations

import warnings

import pytest
from service_cases import opened_services, served

from deltakeeper.apply import apply_delta

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

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
