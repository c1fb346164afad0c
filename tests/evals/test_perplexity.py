"""Negative log-likelihood against one passage at a time in double precision."""

from __future__ import annotations

import random

import pytest
import torch
from toy_models import WORDS, toy_model, toy_tokenizer

from deltakeeper.evals.perplexity import passage_nll


def brute_force(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        logp = model(ids).logits[0].double().log_softmax(-1)
    return -sum(logp[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)), ids.shape[1] - 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_sums_and_counts_equal_brute_force(kind, batch_size):
    model, tokenizer = toy_model(kind), toy_tokenizer()
    draw = random.Random(4)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 40))) for _ in range(11)]
    expected = [brute_force(model, tokenizer, text) for text in texts]
    sums, counts = passage_nll(model, tokenizer, texts, batch_size=batch_size)
    assert counts == [n for _, n in expected]
    assert sums == pytest.approx([s for s, _ in expected], rel=1e-5)


def test_texts_too_short_to_predict_count_nothing():
    sums, counts = passage_nll(toy_model("llama"), toy_tokenizer(), ["w1", "", "w1 w2"])
    assert counts == [0, 0, 1]
    assert sums[:2] == [0.0, 0.0]
    assert sums[2] > 0


def test_softmax_is_float32_for_a_model_in_bfloat16():
    model, tokenizer = toy_model("llama").to(torch.bfloat16), toy_tokenizer()
    text = " ".join(WORDS)
    (got,), _ = passage_nll(model, tokenizer, [text])
    expected, _ = brute_force(model, tokenizer, text)
    assert got == pytest.approx(expected, rel=1e-5)
