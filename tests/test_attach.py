"""Running a delta beside a live base: same sums, no rounding of the delta, and every bit back afterwards."""

from __future__ import annotations

import pytest
import torch

from deltakeeper.attach import Change, attached
from deltakeeper.errors import DeltakeeperError
from deltakeeper.lab.synthetic import build_policy

IDS = torch.tensor([[1, 12, 35, 2, 7]])


def tied_policy(dtype=torch.float32):
    model = build_policy()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(dtype)


def conv_policy():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def changes_for(model, scale=1e-2):
    generator = torch.Generator().manual_seed(0)
    return [Change(n, "delta", torch.randn(p.shape, generator=generator) * scale) for n, p in model.named_parameters()]


@torch.inference_mode()
def logits(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("build", [build_policy, tied_policy, conv_policy])
def test_attached_equals_merged_in_float32_and_detaching_restores_bits(build):
    model, merged = build(), build()
    changes = changes_for(model)
    for change in changes:
        merged.get_parameter(change.name).data += change.tensor
    before, modules = logits(model), list(model.modules())
    with attached(model, changes):
        assert torch.allclose(logits(model), logits(merged), atol=1e-4)
        assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.equal(logits(model), before)
    assert list(model.modules()) == modules


def test_a_delta_far_below_the_weights_ulp_still_acts():
    model = tied_policy(torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    signs = torch.where(torch.arange(weight.shape[1]) % 2 == 0, 1.0, -1.0)
    weight.data.copy_(0.5 * signs)  # their products with ones cancel, so that the delta alone is left
    delta = torch.full(weight.shape, 1e-6)
    assert torch.equal((weight.data.float() + delta).bfloat16(), weight.data)  # a merge would lose every entry
    x = torch.ones(1, weight.shape[1], dtype=torch.bfloat16)
    with attached(model, [Change(name, "delta", delta)]), torch.inference_mode():
        out = model.model.layers[0].mlp.down_proj(x).float()
    assert torch.allclose(out, torch.full_like(out, weight.shape[1] * 1e-6), rtol=1e-2)


def test_values_stand_in_for_weights():
    model, other = tied_policy(), build_policy(5)
    values = [Change(n, "value", p.detach()) for n, p in other.named_parameters() if n != "lm_head.weight"]
    other.lm_head.weight = other.model.embed_tokens.weight
    with attached(model, values):
        assert torch.equal(logits(model), logits(other))


def test_what_does_not_fit_is_refused_and_leaves_the_model_alone():
    model = build_policy()
    before = logits(model)
    good = Change("lm_head.weight", "delta", torch.ones(130, 64))
    for bad in (
        Change("no.such.weight", "delta", torch.ones(1)),
        Change("lm_head.weight", "delta", torch.ones(3, 3)),
    ):
        with (
            pytest.raises(DeltakeeperError, match="does not fit the loaded model"),
            attached(model, [good, bad]),
        ):
            pass
        assert torch.equal(logits(model), before)
