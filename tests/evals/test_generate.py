"""Greedy generation: the same answers as the reference loop, one prompt at a time, whatever the batch."""

from __future__ import annotations

import random

import pytest
import torch
from toy_models import EOS, WORDS, toy_model, toy_tokenizer

from deltakeeper.evals.generate import encode_prompt, generate_answers

NEW_TOKENS = 24


def varied_prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 17))) for _ in range(count)]


def one_by_one(model, tokenizer, prompts, system=None, max_new_tokens=NEW_TOKENS):
    answers = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt, system)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def biased_to_stop(model, amount: float):
    """Raise the logit of the end token, so that rows of one batch end at different steps."""
    return model.lm_head.register_forward_hook(
        lambda _, __, out: out.index_add(-1, torch.tensor([EOS]), torch.full((*out.shape[:-1], 1), amount))
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("system", [None, "w1 w2 w3 w4 w5"])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_answers_equal_the_reference_loop(kind, system, batch_size):
    model, tokenizer = toy_model(kind), toy_tokenizer()
    prompts = varied_prompts(23, seed=batch_size)
    hook = biased_to_stop(model, 2.0)
    expected = one_by_one(model, tokenizer, prompts, system)
    got = generate_answers(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=batch_size, system=system)
    hook.remove()
    lengths = {len(answer.split()) for answer in expected}
    assert len(lengths) > 3, "the toy must end its answers at different steps for this test to mean anything"
    assert got == expected


def record_forwards(model):
    calls = []

    def note(_, __, kwargs, out):
        calls.append((tuple(kwargs["input_ids"].shape), tuple(out.logits.shape)))

    return calls, model.register_forward_hook(note, with_kwargs=True)


def test_ended_rows_leave_the_batch_and_the_loop_stops_with_the_last():
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    prompts = varied_prompts(32, seed=7)
    stop, (calls, hook) = biased_to_stop(model, 3.0), record_forwards(model)
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=32)
    hook.remove()
    stop.remove()
    rows = [shape[0] for shape, _ in calls[1:]]  # the first call reads the shared beginning
    assert rows[0] == 32
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 16
    assert len(rows) <= max(len(answer.split()) for answer in answers) + 1


def test_only_the_last_position_gets_logits():
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    calls, hook = record_forwards(model)
    generate_answers(model, tokenizer, varied_prompts(6, seed=1), max_new_tokens=3)
    hook.remove()
    assert len(calls) > 2
    assert all(logits[1] == 1 for ids, logits in calls[1:])


def test_the_shared_beginning_is_read_once_a_batch_at_most():
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    system = " ".join(WORDS[:30])
    calls, hook = record_forwards(model)
    generate_answers(model, tokenizer, varied_prompts(8, seed=2), max_new_tokens=1, batch_size=4, system=system)
    hook.remove()
    wide = [ids for ids, _ in calls if ids[1] > 30]
    assert wide and all(rows == 1 for rows, _ in wide)


@pytest.mark.parametrize("prompts", [[], ["w1 w2 w3"], ["w1"] * 5])
def test_few_and_equal_prompts(prompts):
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    got = generate_answers(model, tokenizer, prompts, max_new_tokens=5)
    assert got == one_by_one(model, tokenizer, prompts, max_new_tokens=5)


def test_progress_ends_at_all_prompts():
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    seen = []
    generate_answers(
        model,
        tokenizer,
        varied_prompts(7, seed=3),
        max_new_tokens=1,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 7), (6, 7), (7, 7)]
