"""Traces built layer by layer: the numbers of whole distributions, whatever the chunks and however little is held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lens_traces import LAYERS, NAMES, PLACES, all_log_probs, make_traces, new_builder

from deltakeeper.errors import DataError
from deltakeeper.lens import metrics
from deltakeeper.lens.trace_json import to_json


def test_cells_equal_the_metrics_of_whole_distributions():
    log_probs, trace = all_log_probs(), make_traces()["half"]
    own = log_probs["half"]
    np.testing.assert_allclose(trace.entropy, metrics.entropy(own), rtol=1e-4)
    np.testing.assert_allclose(trace.kl_final, metrics.kl(own[-1:], own), rtol=1e-4, atol=1e-7)
    for name in ("base", "tuned"):
        np.testing.assert_allclose(trace.kl[name], metrics.kl(log_probs[name], own), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(trace.js[name], metrics.js(log_probs[name], own), rtol=1e-4, atol=1e-7)
    ids, probs = metrics.top_k(own, 3)
    assert (trace.top_ids == ids.numpy()).all()
    np.testing.assert_allclose(trace.top_probs, probs, rtol=1e-4)
    np.testing.assert_array_equal(trace.targets["refusal"].rank, metrics.rank(own, torch.tensor([3, 7])))
    produced = trace.targets["produced"]
    assert produced.ids == (5, 6)
    np.testing.assert_allclose(produced.log_prob[:, 1], own[:, 1, 6], rtol=1e-4)
    np.testing.assert_array_equal(produced.rank[:, 0], (own[:, 0] > own[:, 0, 5:6]).sum(-1))


def test_every_token_that_is_ever_likely_has_its_curve_and_its_spelling():
    log_probs, traces = all_log_probs(), make_traces()
    for name in NAMES:
        trace = traces[name]
        for place in range(PLACES):
            last = {int(i) for other in NAMES for i in traces[other].top_ids[-1, place]}
            assert set(trace.trajectories[place]) == last | set(trace.top_ids[:, place].ravel().tolist())
            for token, curve in trace.trajectories[place].items():
                np.testing.assert_allclose(curve, log_probs[name][:, place, token].exp(), atol=1e-5)
                assert trace.word(token) == f"w{token}"
    assert traces["base"].word(999) == "[999]"


@pytest.mark.parametrize("hold", [0, 1 << 20, 1400])
@pytest.mark.parametrize("chunks", [[[0, 1, 2, 3]], [[3], [1, 0], [2]]])
def test_chunks_and_bytes_held_change_nothing(chunks, hold):
    log_probs, builder = all_log_probs(), None
    builder = new_builder(log_probs, hold=hold)
    for chunk in chunks:
        builder.add(chunk, {name: values[chunk] for name, values in log_probs.items()})
    if hold == 1 << 20:
        assert builder.missing == ()
    elif hold == 0:
        assert len(builder.missing) == LAYERS - 1  # the last one given is followed at once
    for layer in builder.missing:
        builder.add([layer], {name: values[[layer]] for name, values in log_probs.items()})
    expected = new_builder(log_probs)
    expected.add(range(LAYERS), log_probs)
    assert {n: to_json(t) for n, t in builder.build().items()} == {n: to_json(t) for n, t in expected.build().items()}


def test_identical_models_keep_all_and_the_base_keeps_nothing():
    traces = make_traces()
    assert (traces["tuned"].js["tuned"] == 0).all() and (traces["base"].kl["base"] == 0).all()
    assert (traces["tuned"].shift["dot"] == traces["tuned"].shift["tuned_square"]).all()
    assert (traces["base"].shift["dot"] == 0).all()
    np.testing.assert_allclose(traces["half"].shift["dot"] / traces["half"].shift["tuned_square"], 0.5, rtol=1e-4)


def test_what_cannot_be_traced_is_refused():
    log_probs = all_log_probs()
    builder = new_builder(log_probs)
    with pytest.raises(DataError, match="layer 0 has not been given"):
        builder.build()
    with pytest.raises(ValueError, match="give log-softmax"):
        builder.add(range(LAYERS), {name: values + 1 for name, values in log_probs.items()})
    with pytest.raises(ValueError, match="every variant"):
        builder.add([0], {"base": log_probs["base"][:1]})
    with pytest.raises(ValueError, match="every variant"):
        builder.add([9], {name: values[:1] for name, values in log_probs.items()})
    with pytest.raises(ValueError, match="layers × positions × vocabulary"):
        builder.add([0], log_probs)
    with pytest.raises(ValueError, match="references are variants"):
        new_builder(log_probs, references=("nobody",))


def test_fewer_words_than_asked_for_and_masked_tokens_are_no_trouble():
    log_probs = all_log_probs()
    for values in log_probs.values():
        values[..., -1] = -torch.inf
    log_probs = {name: values.log_softmax(-1) for name, values in log_probs.items()}
    builder = new_builder(log_probs, top=50, targets={"masked": (22,)})
    builder.add(range(LAYERS), log_probs)
    trace = builder.build()["half"]
    assert trace.top_ids.shape[2] == 23
    assert np.isnan(trace.targets["masked"].log_prob).all() and (trace.targets["masked"].rank == 22).all()
