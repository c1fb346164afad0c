"""Decoding through a tail: where the usual recipe is wrong, chunks of layers and rows, parts of blocks, other tails."""

from __future__ import annotations

import copy

import pytest
import torch
from lens_families import build_family, sample_ids

from deltakeeper.errors import LensError
from deltakeeper.lens import capture, check_identity, decode
from deltakeeper.lens.decode import BYTES_A_LOGIT

pytestmark = pytest.mark.filterwarnings("ignore")


def whole(model, streams, **options):
    """All chunks put together, `(layers, rows, positions, vocabulary)`."""
    rows: dict[range, list[torch.Tensor]] = {}
    for chunk in decode(model, streams, **options):
        rows.setdefault(chunk.rows, []).append(chunk.values)
    return torch.cat([torch.cat(values) for values in rows.values()], 1)


def usual(model, stream):
    with torch.no_grad():
        norm = getattr(model.get_decoder(), "norm", None) or model.get_decoder().final_layernorm
        return model.get_output_embeddings()(norm(stream))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "olmo2"])
def test_middle_layers_are_norm_and_head_where_that_is_right(kind):
    model, ids = build_family(kind), sample_ids()
    streams = capture(model, ids)
    assert torch.allclose(whole(model, streams, output="logits"), usual(model, streams.block), atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "cohere2", "granite"])
def test_norm_and_head_is_wrong_where_the_tail_does_more(kind):
    model, ids = build_family(kind), sample_ids()
    streams = capture(model, ids)
    ours = whole(model, streams, output="logits")
    theirs = usual(model, streams.block)
    assert torch.allclose(ours[-1], streams.logits, atol=1e-6)
    assert (theirs[-1] - streams.logits).abs().max() > 0.05 * streams.logits.abs().max()
    assert (theirs[0] - ours[0]).abs().max() > 0.05 * ours[0].abs().max()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba"])
def test_chunks_are_the_whole(kind):
    model, ids = build_family(kind, **({} if kind == "gpt2" else {"num_hidden_layers": 4})), sample_ids(3)
    streams = capture(model, ids, positions=[1, -1])
    everything = whole(model, streams)
    assert torch.allclose(everything.exp().sum(-1), torch.ones(everything.shape[:-1]), atol=1e-5)
    cell = 2 * 64 * BYTES_A_LOGIT
    for cells in (1, 2, 3, 5, 7):
        chunks = list(decode(model, streams, memory=cells * cell))
        assert all(c.values.numel() * BYTES_A_LOGIT <= cells * cell for c in chunks)
        assert all(c.values.shape[:2] == (len(c.layers), len(c.rows)) for c in chunks)
        assert torch.allclose(whole(model, streams, memory=cells * cell), everything, atol=1e-5)
    some = whole(model, streams, layers=[0, -1], memory=3 * cell)
    assert torch.allclose(some, everything[[0, -1]], atol=1e-5)
    with pytest.raises(LensError, match="allow more memory"):
        next(decode(model, streams, memory=cell - 1))


def test_the_model_is_whole_between_chunks():
    model, ids = build_family("llama"), sample_ids()
    plain = model(ids).logits
    streams = capture(model, ids)
    for _ in decode(model, streams, memory=7 * 64 * BYTES_A_LOGIT):
        assert torch.is_grad_enabled()
        assert torch.equal(model(ids).logits, plain)


def test_another_tail_reads_the_same_streams():
    base, ids = build_family("llama"), sample_ids()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[0].mlp.down_proj.weight.add_(0.1)
    streams = capture(tuned, ids)
    assert torch.equal(whole(tuned, streams, tail=base), whole(tuned, streams))
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.5)
    streams = capture(tuned, ids)
    own, shared = whole(tuned, streams, output="logits"), whole(tuned, streams, tail=base, output="logits")
    assert torch.allclose(own, 1.5 * shared, atol=1e-6)
    deeper = build_family("llama", num_hidden_layers=3)  # the tail may have another number of blocks
    assert whole(tuned, streams, tail=deeper).shape == own.shape


SUMS = ["llama", "gemma2", "granite", "gpt2", "bloom", "gptj", "opt", "falcon", "phi", "cohere", "mixtral", "olmo2"]


@pytest.mark.parametrize("kind", SUMS)
def test_attention_and_mlp_add_up_to_what_a_block_adds(kind):
    model, ids = build_family(kind), sample_ids()
    streams = capture(model, ids, positions=[2, -1], parts=("block", "attention", "mlp"))
    before = streams.block[0]
    added = streams.attention[1] + streams.mlp[1]
    assert torch.allclose(before + added, streams.block[1], atol=1e-5)
    assert streams.attention[1].norm() > 1e-4
    assert streams.mlp[1].norm() > 1e-6
    assert whole(model, streams, part="mlp").shape == (2, 2, 2, 64)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2", "mixtral"])
def test_parts_are_found_beside_a_huge_token_in_bfloat16(kind):
    model, ids = build_family(kind), sample_ids()
    precise = capture(model, ids, parts=("block", "attention", "mlp"))
    with torch.no_grad():
        model.get_input_embeddings().weight[ids[0, 0]] *= 1e4
    streams = capture(model.bfloat16(), ids, parts=("block", "attention", "mlp"))
    for part in ("attention", "mlp"):
        found, true = streams.part(part)[:, 1].float(), precise.part(part)[:, 1]
        assert (found - true).norm() < 0.05 * true.norm()


def test_a_mixer_alone_is_attention():
    model, ids = build_family("mamba"), sample_ids()
    streams = capture(model, ids, parts=("block", "attention", "mlp"))
    assert streams.mlp is None
    assert torch.allclose(streams.block[0] + streams.attention[1], streams.block[1], atol=1e-6)


def test_parts_that_cannot_be_told_apart_or_were_not_asked_for_are_an_error():
    model, ids = build_family("bert"), sample_ids()
    with pytest.raises(LensError, match="leave attention and mlp out"):
        capture(model, ids, parts=("attention",))
    streams = capture(model, ids)
    with pytest.raises(LensError, match="'mlp' was not kept, or"):
        next(decode(model, streams, part="mlp"))
    with pytest.raises(LensError, match="'mlps' is no part"):
        capture(model, ids, parts=("mlps",))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral", "gpt2"])
def test_bfloat16_keeps_the_identity(kind):
    model, ids = build_family(kind).bfloat16(), sample_ids(5)
    streams = capture(model, ids, positions=[-1])
    found = check_identity(model, streams)
    assert found.error <= found.tolerance
    assert streams.block.dtype == torch.bfloat16
    assert (whole(model, streams, output="logits")[-1] - streams.logits.float()).abs().max() < 0.02
