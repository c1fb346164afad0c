"""A batch of many tenants gives each what it gets alone, and what its merged model gives, for every architecture."""

from __future__ import annotations

import math

import pytest
import torch
from tenants import family, ids, logits, mixed

from deltakeeper.overlay import attach
from deltakeeper.testing import KINDS

CODECS = (
    "bitdelta",
    "bitdelta:bits=2",
    "svd:rank=4",
    "magnitude:keep=0.1",
    "rtn:bits=4",
    "dense",
    "bitdelta+svd:rank=2",
)


def compare(found, true, atol):
    """Logits of a tenant: those of its merged model, and minus infinity for tokens that it has not."""
    known = true.shape[-1]
    assert torch.allclose(found[..., :known], true, atol=atol), float((found[..., :known] - true).abs().max())
    assert torch.all(found[..., known:] == -math.inf)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_each_tenant_alone_and_its_merged_model(kind, tmp_path):
    models = family(kind, tmp_path)
    first = models.tune("first", "bitdelta", seed=11)
    planes = models.tune("planes", "bitdelta:bits=3", seed=12)
    grown = models.tune("grown", "bitdelta+svd:rank=2", seed=13, extra=5)
    live = models.live()
    tokens = ids(4)
    size = live.config.vocab_size
    tokens[3, 2:4] = size + 2  # tokens that the last tenant alone has
    before = logits(live, tokens[:3])
    overlay = attach(live)
    assert torch.equal(logits(live, tokens[:3]), before)
    deltas = [overlay.load(first), overlay.load(planes, planes=3), overlay.load(grown)]
    coarse = overlay.load(planes, planes=2)
    slots = [0, *(overlay.publish(delta) for delta in deltas)]
    assert overlay.publish(coarse) == 4
    together = mixed(overlay, slots, tokens)
    assert together.shape[-1] == size + 5 == deltas[2].vocabulary == overlay.vocabulary
    compare(together[0], before[0], 1e-5)
    for row, artifact in enumerate((first, planes, grown), start=1):
        compare(together[row], logits(models.merged(artifact), tokens[row : row + 1])[0], 5e-5)
    for row, slot in enumerate(slots):
        alone = mixed(overlay, [slot], tokens[row : row + 1])[0]
        assert torch.allclose(together[row], alone, atol=1e-5)
    order = [2, 0, 3, 1]
    shuffled = mixed(overlay, [slots[i] for i in order], tokens[order])
    assert torch.allclose(shuffled, together[order], atol=1e-5)
    fewer = mixed(overlay, [4], tokens[2:3])[0]
    assert not torch.allclose(fewer, together[2], atol=1e-4)
    assert torch.equal(logits(live, tokens[:3]), before)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mixtral", "qwen2_moe"])
def test_every_codec_serves_what_it_merges_to(kind, codec, tmp_path):
    models = family(kind, tmp_path)
    artifact = models.tune("tuned", codec, extra=3)
    live, tokens = models.live(), ids(3)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    true = logits(models.merged(artifact), tokens)
    base = logits(live, tokens)
    found = mixed(overlay, [slot, 0, slot], tokens)
    compare(found[0], true[0], 5e-5)
    compare(found[1], base[1], 1e-5)
    compare(found[2], true[2], 5e-5)
    assert not torch.allclose(true[..., : base.shape[-1]], base, atol=1e-3)


def test_rows_of_one_token_share_their_position(tmp_path):
    models = family("gpt2", tmp_path)
    artifact = models.tune("tuned", "bitdelta")
    live, tokens = models.live(), ids(3, length=1)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    found = mixed(overlay, [slot, 0, slot], tokens)
    compare(found[0], logits(models.merged(artifact), tokens[:1])[0], 5e-5)
    compare(found[1], logits(models.live(), tokens[1:2])[0], 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt2", "mixtral"])
def test_in_bfloat16_rows_are_near_the_merged_model_in_float32(kind, tmp_path):
    models = family(kind, tmp_path, torch.bfloat16)
    artifact = models.tune("tuned", "bitdelta:bits=2")
    live, tokens = models.live(), ids(3)
    overlay = attach(live)
    slot = overlay.publish(overlay.load(artifact))
    found = mixed(overlay, [0, slot, slot], tokens)
    true = logits(models.merged(artifact).float(), tokens)
    base = logits(models.live().float(), tokens)
    spread = true.std()
    assert (found[0] - base[0]).abs().max() < 0.1 * spread
    assert (found[1:] - true[1:]).abs().max() < 0.1 * spread
    assert (true - base).abs().max() > 0.2 * spread


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_a_base_row_in_bfloat16_has_the_same_bits_in_any_company(kind, tmp_path):
    models = family(kind, tmp_path, torch.bfloat16)
    live, tokens = models.live(), ids(4)
    overlay = attach(live)
    alone = mixed(overlay, [0] * 4, tokens)
    slots = [overlay.publish(overlay.load(models.tune(f"t{i}", "bitdelta", seed=i, extra=i % 2))) for i in range(3)]
    company = mixed(overlay, [0, *slots], tokens)
    assert torch.equal(company[0, :, : alone.shape[-1]], alone[0])
    assert torch.equal(mixed(overlay, [0] * 4, tokens)[..., : alone.shape[-1]], alone)
