"""Variants of one base in one batch say what each says alone."""

from __future__ import annotations

import pytest
import torch
from lens_families import sample_ids

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import LensError
from deltakeeper.lens import Compressed, Models, Variants, capture, decode, weights_of
from deltakeeper.lens.decode import BYTES_A_LOGIT
from deltakeeper.overlay import attach
from deltakeeper.testing import write_pair


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "mixtral", "qwen2"])
def pair(request, tmp_path_factory):
    """Folders of base and fine-tune, and artifacts by codec."""
    folder = tmp_path_factory.mktemp(request.param)
    base, tuned = write_pair(request.param, folder, dtype=torch.float32, scale=0.02)
    artifacts = {}
    for name, codec in (("one", "bitdelta"), ("three", "bitdelta:bits=3"), ("rank", "svd:rank=2")):
        compress(base, tuned, folder / name, codec)
        artifacts[name] = open_artifact(folder / name)
    return base, tuned, artifacts


def open_all(model, pair, **options):
    _, tuned, artifacts = pair
    whole = {"tuned": weights_of(load(tuned))}
    coarse = Compressed(artifacts["three"], planes=2)
    return Variants(model, {**artifacts, "two": coarse}, whole=whole, **options)


def texts():
    ids, mask = sample_ids(3), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return ids, mask


def together(compared, captured, **options):
    """Values by name, all chunks put together."""
    rows = {name: {} for name in compared.names}
    for chunk in compared.decode(captured, **options):
        for name, decoded in chunk.items():
            rows[name].setdefault(decoded.rows, []).append(decoded.values)
    return {name: torch.cat([torch.cat(v) for v in found.values()], 1) for name, found in rows.items()}


def alone(model, streams, **options):
    (chunk,) = decode(model, streams, **options)
    return chunk.values


def test_variants_say_what_each_says_alone(pair, tmp_path):
    base, tuned, artifacts = pair
    live, (ids, mask) = load(base), texts()
    plain = live(ids).logits
    with open_all(live, pair) as variants:
        assert variants.names == ("base", "one", "three", "rank", "two", "tuned")
        captured = variants.capture(ids, mask, [0, -1])
        values = together(variants, captured)
        found = variants.check_identity(captured)
    assert all(identity.error <= identity.tolerance for identity in found.values())
    assert torch.equal(live(ids).logits, plain)
    assert "forward" not in live.lm_head.__dict__
    for name, model in (("base", load(base)), ("tuned", load(tuned))):
        streams = capture(model, ids, mask, [0, -1])
        assert torch.allclose(captured[name].block, streams.block, atol=2e-5), name
        assert torch.allclose(values[name], alone(model, streams), atol=5e-5), name
    for name, artifact in artifacts.items():
        model = load(apply_delta(base, artifact, tmp_path / name))
        streams = capture(model, ids, mask, [0, -1])
        assert torch.allclose(captured[name].block, streams.block, atol=5e-5), name
        assert torch.allclose(captured[name].logits, streams.logits, atol=5e-5), name
        assert torch.allclose(values[name], alone(model, streams), atol=5e-5), name
    assert not torch.allclose(values["one"], values["base"], atol=1e-3)
    assert not torch.allclose(values["two"], values["three"], atol=1e-3)


def test_chunks_of_prompts_layers_and_tails(pair):
    base, tuned, _ = pair
    live, (ids, mask) = load(base), texts()
    with open_all(live, pair) as variants:
        captured = variants.capture(ids, mask, [-1], parts=("block",))
        values = together(variants, captured)
        read_by_base = together(variants, captured, tail="base", output="logits")
        read_by_tuned = together(variants, captured, tail="tuned", output="logits")
        memory = 7 * BYTES_A_LOGIT * captured["base"].logits.shape[-1]
        for name, chunked in together(variants, captured, memory=memory).items():
            assert torch.allclose(chunked, values[name], atol=1e-5), name
    with open_all(live, pair, prompts_per_pass=2) as variants:
        pieces = variants.capture(ids, mask, [-1])
        variants.check_identity(pieces)
        for name, streams in pieces.items():
            assert torch.allclose(streams.block, captured[name].block, atol=1e-5), name
    first, second = load(base), load(tuned)
    for name, streams in captured.items():
        expected = alone(first, streams, output="logits")
        assert torch.allclose(read_by_base[name], expected, atol=5e-5), name
        expected = alone(second, streams, output="logits")
        assert torch.allclose(read_by_tuned[name], expected, atol=5e-5), name


def test_models_in_memory_have_the_same_interface(pair):
    base, tuned, _ = pair
    ids, mask = texts()
    models = Models({"base": load(base), "tuned": load(tuned)})
    captured = models.capture(ids, mask, [0, -1])
    models.check_identity(captured)
    if "experts" in " ".join(name for name, _ in models.models["tuned"].named_parameters()):
        changes = weights_of(models.models["tuned"])  # which the checkpoint stores one by one
    else:
        with open_checkpoint(tuned) as checkpoint:
            changes = weights_of(checkpoint)
    with Variants(load(base), whole={"tuned": changes}) as variants:
        streams = variants.capture(ids, mask, [0, -1])
        theirs = together(variants, streams, tail="base")
    for name, values in together(models, captured, tail="base").items():
        assert torch.allclose(values, theirs[name], atol=5e-5), name
        assert torch.allclose(captured[name].block, streams[name].block, atol=2e-5), name


def test_an_overlay_that_is_live_stays(pair):
    base, _, artifacts = pair
    live, (ids, mask) = load(base), texts()
    overlay = attach(live)
    first = overlay.publish(overlay.load(artifacts["rank"]))
    with Variants(overlay, {"one": artifacts["one"]}, base="origin") as variants:
        assert len(overlay.published) == 2
        variants.check_identity(variants.capture(ids, mask, [-1], parts=("block", "attention", "mlp")))
    assert list(overlay.published) == [first]
    overlay.detach()


def test_wrong_use_says_so(pair):
    base, _, artifacts = pair
    live, (ids, mask) = load(base), texts()
    variants = Variants(live, {"one": artifacts["one"]})
    with pytest.raises(LensError, match="not open"):
        variants.capture(ids, mask, [-1])
    with pytest.raises(LensError, match="two variants are called 'base'"):
        Variants(live, {"base": artifacts["one"]})
    with variants:
        captured = variants.capture(ids, mask, [-1])
        with pytest.raises(LensError, match="there is no 'nobody'"):
            next(variants.decode(captured, tail="nobody"))
        broken = {**captured, "one": captured["base"]}
        with pytest.raises(LensError, match="'one' "):
            variants.check_identity(broken)
    plain = live(ids).logits
    with pytest.raises(ZeroDivisionError), variants:
        raise ZeroDivisionError
    assert torch.equal(live(ids).logits, plain)
