"""Many prompts of many variants traced at once say what each prompt says alone, and nothing unproven is returned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import DataError, LensError
from deltakeeper.lens import Compressed, Models, Variants, metrics, weights_of
from deltakeeper.lens.overview import overview, to_json
from deltakeeper.lens.tracing import trace_prompts
from deltakeeper.live_base import open_base
from deltakeeper.testing import write_pair
from deltakeeper.testing.models import write_tokenizer

PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", "w20 w21 w22"]
TARGETS = {"few": (5, 9), "one": (11,)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    base, tuned = write_pair("llama", folder, dtype=torch.float32, scale=0.03)
    write_tokenizer(base)
    compress(base, tuned, folder / "two", "bitdelta:bits=2")
    return open_base(base), tuned, open_artifact(folder / "two")


def open_all(pair, **options):
    live, tuned, artifact = pair
    with open_checkpoint(tuned) as checkpoint:
        whole = {"tuned": weights_of(checkpoint)}
    deltas = {"two": artifact, "one": Compressed(artifact, planes=1)}
    return Variants(live.model, deltas, whole=whole, **options)


def trace(pair, prompts=PROMPTS, **options):
    options = {"tuned": "tuned", "targets": TARGETS} | options
    with open_all(pair) as variants:
        return trace_prompts(variants, pair[0].tokenizer, prompts, **options)


@pytest.fixture(scope="module")
def traces(pair):
    return trace(pair)


def test_everyone_reads_the_base_s_answer(pair, traces):
    model = pair[0].model
    assert list(traces) == ["base", "two", "one", "tuned"]
    for number, prompt in enumerate(PROMPTS):
        ids = pair[0].tokenizer(prompt, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        found = traces["base"][number]
        assert [pair[0].tokenizer.decode([i]) for i in ids[0]] == list(found.tokens)
        assert found.positions.tolist() == [length - 1, length, length + 1, length + 2]
        assert found.targets["produced"].ids[:3] == tuple(ids[0, length:].tolist())
        assert len({own[number].meta.prompt for own in traces.values()}) == 1
        assert found.meta.text == "base, its likeliest tokens" and found.meta.identity_error < 1e-3
        logits = model(ids).logits[0, length - 1 :].log_softmax(-1)
        np.testing.assert_allclose(found.entropy[-1], metrics.entropy(logits).detach(), rtol=1e-3)
        rank = (logits[0] > logits[0, [5, 9]].max()).sum()
        assert found.targets["few"].rank[-1, 0] == rank


def same(one, other):
    for name in ("top_ids", "layers", "positions"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for left, right in [(one.entropy, other.entropy), *((one.js[n], other.js[n]) for n in one.js)]:
        np.testing.assert_allclose(left, right, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(one.shift["dot"], other.shift["dot"], rtol=1e-2, atol=1e-4)
    assert [set(curves) for curves in one.trajectories] == [set(curves) for curves in other.trajectories]


def test_prompts_alone_and_chunks_of_layers_change_nothing(pair, traces):
    for number, prompt in enumerate(PROMPTS):
        for name, (found,) in trace(pair, [prompt]).items():
            same(found, traces[name][number])
    for name, own in trace(pair, memory=300_000).items():
        for found, expected in zip(own, traces[name], strict=True):
            same(found, expected)


def test_models_in_memory_are_traced_alike(pair, traces):
    live, tuned, _ = pair
    models = Models({"base": live.model, "tuned": open_base(tuned, tokenizer=False).model})
    found = trace_prompts(models, live.tokenizer, PROMPTS, tuned="tuned", targets=TARGETS)
    for name, own in found.items():
        for one, other in zip(own, traces[name], strict=True):
            np.testing.assert_allclose(one.entropy, other.entropy, rtol=2e-3)


def test_positions_layers_answers_and_tails(pair):
    seconds, done = {}, []
    found = trace(
        pair,
        positions=[1, -1, 0],
        layers=[1],
        answers=[[7, 8]] * 3,
        whose="mine",
        decoder="base",
        about={"two": {"delta": "d", "codec": "c"}, "base": {"base": "b"}},
        seconds=seconds,
        progress=lambda *counts: done.append(counts),
    )
    assert found["two"][0].positions.tolist() == [3, 4, 5] and found["two"][0].layers.tolist() == [1]
    assert found["two"][1].tokens[-2:] == ("w3", "w4")
    meta = found["two"][0].meta
    assert (meta.delta, meta.codec, meta.base, meta.text, meta.decode) == ("d", "c", "b", "mine", "base")
    assert found["base"][0].meta.delta is None
    assert {"read", "check", "decode", "measure"} <= set(seconds) and done[-1] == (3, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"positions": [9]}, "position 9 lies outside"),
        ({"positions": [-4]}, "position -4 lies outside"),
        ({"layers": [5]}, "layers 0 to 1"),
        ({"tuned": "nobody"}, "no variant 'nobody'"),
        ({"references": ["x"]}, "no variant 'x'"),
        ({"memory": 1000}, "allow more memory"),
    ],
)
def test_what_does_not_exist_is_refused(pair, options, words):
    with pytest.raises(LensError, match=words):
        trace(pair, **options)


def test_no_prompts_and_a_system_message_without_a_template_are_refused(pair):
    with pytest.raises(DataError, match="at least one"):
        trace(pair, [])
    with pytest.raises(DataError, match="no chat template"):
        trace(pair, system="be kind")


def test_nothing_is_returned_where_the_lens_misses_the_logits(pair, monkeypatch):
    from deltakeeper.lens import models

    monkeypatch.setattr(models, "tolerance_of", lambda _: -1.0)
    with pytest.raises(LensError, match="misses its own logits"):
        trace(pair)


def test_the_overview_says_where_variants_depart(traces):
    found = {one.variant: one for one in overview(traces, base="base", tuned="tuned")}
    assert found["base"].departs is None and found["base"].kept == (0, 0, None)
    assert found["tuned"].kept[:2] == (pytest.approx(1), pytest.approx(1))
    value = to_json(list(found.values()), traces, 0)
    assert value["variants"]["two"]["prompts"] == 3 and value["layers"] == [0, 1]
    assert len(value["variants"]["two"]["bands"]["js:base"]["median"]) == 2
    alone = overview({name: traces[name] for name in ("base",)}, base="base")
    assert alone[0].kept is None and "kept" not in alone[0].bands
