"""The fine-tuning loop: what is learned, in which order, and that an interruption changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from deltakeeper.errors import RunError
from deltakeeper.lab import sft
from deltakeeper.lab.sft import (
    IGNORED,
    SFTConfig,
    Tokens,
    add_lora,
    answer_loss,
    batches,
    collate,
    learning_rate,
    train,
)
from deltakeeper.lab.synthetic import ALLOWED, PAD, build_policy, reply_rows, requests

ROWS = reply_rows(requests(ALLOWED, held_out=False)[:40], "comply")
CONFIG = SFTConfig(epochs=2, lr=1e-3, batch=8)


def test_collate_keeps_answers_at_the_right_edge():
    inputs, labels = collate([Tokens((1, 2, 3, 4), 2), Tokens((5, 6, 7), 1)], pad=0)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4], [0, 5, 6, 7]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert labels.tolist() == [[3, 4], [IGNORED, 7]]


def test_loss_is_the_cross_entropy_of_the_answer_alone():
    model = build_policy(1)
    row = ROWS[0]
    with torch.inference_mode():
        logits = model(torch.tensor([row.ids])).logits[0]  # (tokens, vocabulary)
        start = len(row.ids) - row.learned
        expected = F.cross_entropy(logits[start - 1 : -1], torch.tensor(row.ids[start:]))
        padded = answer_loss(model, [row, Tokens((1, *row.ids), 1)], PAD) * (row.learned + 1)
        second = F.cross_entropy(model(torch.tensor([[1, *row.ids]])).logits[0, -2:-1], torch.tensor(row.ids[-1:]))
    assert torch.allclose(padded, expected * row.learned + second, atol=1e-4)


def test_every_row_is_seen_once_an_epoch_and_batches_are_of_like_length():
    rows = [Tokens(tuple(range(1, 3 + i % 7)), 1) for i in range(37)]
    seen = [row for batch in batches(rows, 4, seed=3, epoch=0) for row in batch]
    assert sorted(map(id, seen)) == sorted(map(id, rows))
    again = [row for batch in batches(rows, 4, seed=3, epoch=0) for row in batch]
    other = [row for batch in batches(rows, 4, seed=3, epoch=1) for row in batch]
    assert list(map(id, seen)) == list(map(id, again))
    assert list(map(id, seen)) != list(map(id, other))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_warms_up_then_falls(schedule):
    config = SFTConfig(lr=1.0, schedule=schedule, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.05


def test_epoch_decay_falls_after_each_epoch():
    config = SFTConfig(lr=1.0, schedule="epoch_decay", warmup=0.0, epochs=4)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates == pytest.approx([0.85**epoch for epoch in range(4) for _ in range(3)])


def test_training_learns_and_reports():
    model, calls = build_policy(), []
    log = train(model, ROWS, CONFIG, pad=PAD, progress=lambda *call: calls.append(call))
    assert log.losses[1] < log.losses[0]
    assert log.steps == 10 == len(calls)
    assert log.tokens == 2 * sum(len(r.ids) for r in ROWS)
    assert calls[-1][:2] == (10, 10)
    assert not model.training


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    start = build_policy()
    whole, broken = copy.deepcopy(start), copy.deepcopy(start)
    train(whole, ROWS, CONFIG, pad=PAD)

    def interrupt(step, _total, _loss, _speed):
        if step == 6:
            raise KeyboardInterrupt

    state = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(broken, ROWS, CONFIG, pad=PAD, state=state, progress=interrupt)
    assert state.with_suffix(".safetensors").is_file()
    resumed = copy.deepcopy(start)
    log = train(resumed, ROWS, CONFIG, pad=PAD, state=state)
    assert len(log.losses) == 2
    assert not list(tmp_path.iterdir())
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_saved_while_running_too(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(sft, "save_state", lambda *args: saved.append(args[2]))
    train(build_policy(), ROWS, replace(CONFIG, save_every=0.0), pad=PAD, state=tmp_path / "run")
    assert saved == list(range(1, 10))


def test_another_runs_state_is_refused(tmp_path):
    def interrupt(step, _total, _loss, _speed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(build_policy(), ROWS, CONFIG, pad=PAD, state=tmp_path / "run", progress=interrupt)
    with pytest.raises(RunError, match="other data or settings"):
        train(build_policy(), ROWS, replace(CONFIG, lr=2e-3), pad=PAD, state=tmp_path / "run")


def test_no_rows_and_exploding_losses_are_errors():
    with pytest.raises(RunError, match="no training examples"):
        train(build_policy(), [], CONFIG, pad=PAD)
    model = build_policy()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(RunError, match="not finite at step 0"):
        train(model, ROWS, CONFIG, pad=PAD)


def test_lora_trains_the_adapter_only(tmp_path):
    model = build_policy()
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapted = add_lora(model, replace(CONFIG, lora_rank=2))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    log = train(adapted, ROWS, replace(CONFIG, lora_rank=2), pad=PAD)
    assert log.losses[1] < log.losses[0]
    for name, p in adapted.base_model.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")])
