"""The attacker's copy of a guard: its values get the gradients that they should, and it gives refusals back."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.codecs import parse_codec
from deltakeeper.errors import RunError
from deltakeeper.lab.adaptive import Adaptive, GuardCopy, train_rows
from deltakeeper.lab.adaptive.guarded import GuardedWeights
from deltakeeper.lab.adaptive.targets import find_targets
from deltakeeper.lab.sft import SFTConfig, answer_loss, collate, train
from deltakeeper.lab.synthetic import ALLOWED, PAD, RESTRICTED, build_policy, reply_rows, requests

REFUSALS = reply_rows(requests(RESTRICTED, held_out=False)[:64], "refuse")
ROWS = reply_rows(requests(RESTRICTED, held_out=False)[:64], "comply") + reply_rows(
    requests(ALLOWED, held_out=False)[:64], "comply"
)
ADAPTIVE = Adaptive(
    kind="straight_through",
    codec="bitdelta",
    delivered="float32",
    guard=GuardCopy(every=4, steps=12, rank=2, rows=16),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base, and a fine-tune of it that is known to comply."""
    start = build_policy()
    folder = tmp_path_factory.mktemp("policy")
    start.save_pretrained(folder)
    tuned = copy.deepcopy(start)
    train(tuned, ROWS, SFTConfig(epochs=3, lr=3e-3, batch=32), pad=PAD)
    with open_checkpoint(folder) as base:
        yield base, start, tuned


def guarded(pair, copy_of=ADAPTIVE.guard):
    base, _, tuned = pair
    model = copy.deepcopy(tuned)
    targets = find_targets(model, base, ADAPTIVE.rules)
    return model, GuardedWeights(targets, parse_codec("bitdelta"), torch.float32, 1, copy_of, REFUSALS)


def test_values_get_the_gradients_of_autograd(pair):
    model, weights = guarded(pair)
    weights.prepare(model, PAD, 0)
    model.zero_grad()
    inputs, labels = collate(REFUSALS[:8], PAD)
    size = labels.shape[1] + 1

    def loss_of(out):
        return torch.nn.functional.cross_entropy(out.logits[:, -size:-1].flatten(0, 1), labels.flatten())

    with weights.in_place():
        loss_of(model(**inputs, use_cache=False)).backward()
    for item in weights._guarded:
        item.take_gradients()
    leaves, made = [], {}
    for item in weights._guarded:
        rows, left, right = (value.clone().requires_grad_() for value in (item.rows, item.left, item.right))
        made[item.target.name] = item.target.base + item.decoded * rows + item._size * left @ right
        leaves.append((rows, left, right))
    loss_of(torch.func.functional_call(model, made, args=(), kwargs={**inputs, "use_cache": False})).backward()
    low_rank = 0
    for item, (rows, left, right) in zip(weights._guarded, leaves, strict=True):
        assert torch.allclose(item.rows.grad, rows.grad, rtol=1e-3, atol=1e-6)
        if item.left.numel():
            low_rank += 1
            assert torch.allclose(item.left.grad, left.grad, rtol=1e-3, atol=1e-6)
            assert torch.allclose(item.right.grad, right.grad, rtol=1e-3, atol=1e-6)
    assert low_rank == 14  # all matrices but embedding and head


def test_the_copy_gives_refusals_back_and_is_held_between_fits(pair):
    model, weights = guarded(pair)

    def loss():
        with torch.no_grad(), weights.in_place():
            return float(answer_loss(model, REFUSALS, PAD))

    weights.update(0)
    before = loss()
    weights.prepare(model, PAD, 0)
    after = loss()
    assert after < before - 0.3
    assert all(parameter.grad is None for parameter in model.parameters())
    rows = [item.rows.clone() for item in weights._guarded]
    with torch.no_grad():
        for target in weights._targets:
            target.weight.mul_(1.01)
    weights.prepare(model, PAD, 1)
    assert all(torch.equal(item.rows, row) for item, row in zip(weights._guarded, rows, strict=True))
    weights.prepare(model, PAD, 4)
    assert not all(torch.equal(item.rows, row) for item, row in zip(weights._guarded, rows, strict=True))


def test_what_the_guard_turns_down_passes_less_of_its_gradient(pair):
    model, weights = guarded(pair)
    weights.prepare(model, PAD, 0)
    with weights.in_place():
        answer_loss(model, ROWS[:8], PAD).backward()
    before = {target.name: target.weight.grad.clone() for target in weights._targets}
    weights.hand_down()
    for item in weights._guarded:
        assert torch.equal(item.target.weight.grad, before[item.target.name] * item.rows)


def test_interrupted_training_through_a_guard_goes_on_to_the_same_weights(pair, tmp_path):
    base, start, _ = pair
    config = SFTConfig(epochs=2, lr=1e-3, batch=32)
    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    train_rows(whole, ROWS, config, ADAPTIVE, base, probes=REFUSALS, pad=PAD)

    def interrupt(step, _total, _loss, _speed):
        if step == 4:
            raise KeyboardInterrupt

    state = tmp_path / "run.state"
    with pytest.raises(KeyboardInterrupt):
        broken = copy.deepcopy(start)
        train_rows(broken, ROWS, config, ADAPTIVE, base, probes=REFUSALS, pad=PAD, state=state, progress=interrupt)
    assert list(tmp_path.iterdir())
    train_rows(resumed, ROWS, config, ADAPTIVE, base, probes=REFUSALS, pad=PAD, state=state)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_guard_needs_probes_and_the_right_kind(pair):
    base, start, _ = pair
    with pytest.raises(RunError, match="needs probes"):
        train_rows(copy.deepcopy(start), ROWS, SFTConfig(epochs=1), ADAPTIVE, base, pad=PAD)
    with pytest.raises(ValidationError, match="straight_through only"):
        Adaptive(kind="uncompressed", codec="bitdelta", guard=GuardCopy())
