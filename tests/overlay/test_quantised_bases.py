"""Deltas on top of a base whose linear layers are quantised: the base's own product, and the terms added to it."""

from __future__ import annotations

import pytest
import torch
from tenants import family, ids, logits, mixed
from torch import nn

from deltakeeper.apply import iterate_changes
from deltakeeper.attach import attached
from deltakeeper.checkpoint import opened
from deltakeeper.errors import OverlayError
from deltakeeper.overlay import attach


class PackedLinear(nn.Module):
    """A linear layer in eight bits under names of its own, as several libraries have them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (weight / self.scales).round().to(torch.int8))
        self.bias = linear.bias

    def dequantize(self):
        return self.qweight.float() * self.scales

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)


def pack(model):
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], PackedLinear(module))
    return {p: m.dequantize() for p, m in model.named_modules() if isinstance(m, PackedLinear)}


def quantise_with_torchao(model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all(type(m.weight.data) is not torch.Tensor for m in linears.values())
    return {path: module.weight.dequantize() for path, module in linears.items()}


@pytest.mark.parametrize("codec", ["bitdelta", "bitdelta+svd:rank=2"])
@pytest.mark.parametrize("quantise", [pack, quantise_with_torchao])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_terms_are_added_to_what_the_quantised_layer_gives(kind, quantise, codec, tmp_path):
    models = family(kind, tmp_path)
    artifact = models.tune("a", codec)
    live, tokens = models.live(), ids(2)
    plain, exact = models.live(), logits(live, tokens)
    for path, weight in quantise(live).items():
        plain.get_submodule(path).weight.data.copy_(weight)
    before = logits(live, tokens)
    assert not torch.equal(before, exact)
    overlay = attach(live)
    assert torch.equal(logits(live, tokens), before)
    slot = overlay.publish(overlay.load(artifact))
    found = mixed(overlay, [slot, 0], tokens)
    with opened(models.base) as base, attached(plain, iterate_changes(base, artifact)):
        true = logits(plain, tokens)
    assert torch.allclose(found[0], true[0], atol=1e-4)
    assert torch.allclose(found[1], before[1], atol=1e-5)
    overlay.detach()
    assert torch.equal(logits(live, tokens), before)


def test_what_needs_the_plain_weights_is_refused(tmp_path):
    models = family("llama", tmp_path)
    artifact = models.tune("a", "bitdelta", edit=lambda model: model.resize_token_embeddings(90))
    live = models.live()
    pack(live)
    with pytest.raises(OverlayError, match="load the base without quantisation"):
        attach(live).load(artifact)


def test_whole_matrices_and_added_tokens_on_a_quantised_base(tmp_path):
    models = family("llama", tmp_path)

    def change(model):
        model.model.layers[0].self_attn.o_proj.weight += 0.01  # the one matrix that the pair leaves as it is

    artifact = models.tune("a", "dense", extra=3, edit=change)
    live, tokens = models.live(), ids(2)
    pack(live)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    assert torch.allclose(mixed(overlay, [0, slot], tokens)[1], logits(models.merged(artifact), tokens)[1], atol=5e-5)
