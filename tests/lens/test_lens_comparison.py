"""Statistics over traces: labels, alignment, medians and ratios of sums, against loops over the same traces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from lens_traces import LAYERS, all_log_probs, make_traces

from deltakeeper.errors import DataError
from deltakeeper.evals.stats import paired_bootstrap
from deltakeeper.lens import metrics
from deltakeeper.lens.commitment import RULES, commitment_strips, find_commitment
from deltakeeper.lens.comparison import Bands, Grid, bands, bound_kl, difference, grid, spread
from deltakeeper.lens.kept import kept_output, kept_stream
from deltakeeper.lens.trace_statistics import check_alike, collect, read_statistic

SEEDS = range(6)


@pytest.fixture(scope="module")
def prompts():
    """Traces by variant, one a prompt."""
    traced = [make_traces(seed, f"prompt {seed}") for seed in SEEDS]
    return {name: [traces[name] for traces in traced] for name in traced[0]}


def test_statistics_are_found_by_name(prompts):
    trace = prompts["half"][0]
    np.testing.assert_array_equal(read_statistic(trace, "entropy"), trace.entropy)
    np.testing.assert_array_equal(read_statistic(trace, "kl:base"), trace.kl["base"])
    np.testing.assert_array_equal(read_statistic(trace, "js:tuned"), trace.js["tuned"])
    np.testing.assert_array_equal(read_statistic(trace, "top1"), trace.top_probs[..., 0])
    np.testing.assert_array_equal(read_statistic(trace, "rank:refusal"), trace.targets["refusal"].rank)
    expected = all_log_probs(0)["half"].exp()[..., [3, 7]].sum(-1)
    np.testing.assert_allclose(read_statistic(trace, "prob:refusal"), expected, rtol=5e-4)
    np.testing.assert_allclose(read_statistic(trace, "kept"), 0.5, rtol=1e-4)
    np.testing.assert_allclose(read_statistic(trace, "remainder"), 0, atol=1e-3)
    assert read_statistic(trace, "cosine_tuned").shape == (LAYERS, 2)
    for absent in ("kl:nobody", "prob:nobody", "entropy:x", "kept:x", "nonsense", ""):
        with pytest.raises(DataError, match="has no statistic"):
            read_statistic(trace, absent)
    with pytest.raises(DataError, match="has no statistic 'kept'"):
        read_statistic(dataclasses.replace(trace, shift={}), "kept")


def test_a_grid_has_layers_as_rows_tokens_as_columns_and_the_likeliest_token_in_each_cell(prompts):
    trace = prompts["half"][0]
    found = grid(trace, "entropy")
    assert found.rows == ("0", "1", "2", "3") and found.columns == ("b", "é") and found.unit == "nats"
    assert found.texts[2][1] == f"w{trace.top_ids[2, 1, 0]}" and not found.diverging
    assert "half" in found.title and "entropy" in found.title


def test_a_difference_is_what_the_other_has_more_and_marks_changed_tokens(prompts):
    one, other = prompts["base"][0], prompts["tuned"][0]
    found = difference(one, other, "entropy")
    np.testing.assert_allclose(found.values, other.entropy.astype(float) - one.entropy)
    assert found.diverging and (found.marks == (one.top_ids[..., 0] != other.top_ids[..., 0])).all()


def test_traces_of_other_tokens_or_cells_are_not_compared(prompts):
    one = prompts["base"][0]
    with pytest.raises(DataError, match="same cells"):
        difference(one, prompts["tuned"][1], "entropy")
    other = dataclasses.replace(one, tokens=(*one.tokens[:-1], "x"))
    with pytest.raises(DataError, match="same cells"):
        check_alike([one, other])
    decoded = dataclasses.replace(one, meta=dataclasses.replace(one.meta, decode="base"))
    with pytest.raises(DataError, match="same cells"):
        check_alike([one, decoded])


def test_bands_are_quartiles_over_prompts_at_one_position(prompts):
    found = bands(prompts["half"], "kl:base", position=0)
    for layer in range(LAYERS):
        values = [trace.kl["base"][layer, 0] for trace in prompts["half"]]
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        assert (found.low[layer], found.median[layer], found.high[layer]) == pytest.approx((low, median, high))
    assert found.prompts.tolist() == [6] * LAYERS and found.x.tolist() == [0, 1, 2, 3]


def test_missing_numbers_are_left_out_of_bands_and_counted():
    values = np.array([[1.0, np.nan, np.inf], [3.0, np.nan, 5.0]])
    found = spread(values, np.arange(3.0), "nats", "t")
    assert found.prompts.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(found.median, [2, np.nan, 5])


def test_kept_shares_of_outputs_are_ratios_of_sums_and_medians(prompts):
    found = kept_output(prompts["half"], prompts["base"], "tuned")
    own = np.array([np.sqrt(trace.js["tuned"][:, -1]) for trace in prompts["half"]])
    whole = np.array([np.sqrt(trace.js["tuned"][:, -1]) for trace in prompts["base"]])
    shown = found.bands()
    np.testing.assert_allclose(shown.pooled, 1 - own.sum(0) / whole.sum(0), rtol=1e-5)
    np.testing.assert_allclose(shown.median, np.median(1 - own / whole, 0), rtol=1e-5)
    for name, share in (("tuned", 1), ("base", 0)):
        assert (kept_output(prompts[name], prompts["base"], "tuned").ratios() == share).all()


def test_kept_shares_of_streams_weigh_prompts_by_their_shift(prompts):
    found = kept_stream(prompts["half"])
    dot = np.array([trace.shift["dot"][:, -1] for trace in prompts["half"]], dtype=float)
    square = np.array([trace.shift["tuned_square"][:, -1] for trace in prompts["half"]], dtype=float)
    np.testing.assert_allclose(found.pooled(), dot.sum(0) / square.sum(0))
    for name, share in (("tuned", 1), ("base", 0), ("half", 0.5)):
        assert kept_stream(prompts[name]).pooled() == pytest.approx([share] * LAYERS, rel=1e-4)


def test_prompts_with_nothing_to_keep_are_left_out(prompts):
    base = [dataclasses.replace(trace, js={"tuned": trace.js["tuned"].copy()}) for trace in prompts["base"]]
    base[0] = dataclasses.replace(base[0], js={"tuned": base[0].js["tuned"] * 0 + np.float32(metrics.JS_FLOOR / 2)})
    found = kept_output(prompts["half"], base, "tuned")
    assert np.isnan(found.ratios()[0]).all() and found.bands().prompts.tolist() == [5] * LAYERS
    rest = kept_output(prompts["half"][1:], base[1:], "tuned")
    np.testing.assert_allclose(found.pooled(), rest.pooled())
    nothing = kept_output(prompts["half"][:1], base[:1], "tuned")
    assert np.isnan(nothing.pooled()).all() and np.isnan(nothing.bands().median).all()


def test_shares_can_be_handed_to_the_bootstrap_of_studies(prompts):
    shares = kept_stream(prompts["half"])
    found = paired_bootstrap(lambda counts: shares.pooled(counts)[:, 2], len(SEEDS), resamples=200)
    assert found.value == pytest.approx(shares.pooled()[2]) and found.low <= found.value <= found.high


def test_coarsened_kl_stays_below_the_traced_one(prompts):
    for base, trace in zip(prompts["base"], prompts["half"], strict=True):
        found = bound_kl(base, trace)
        assert (found.values <= trace.kl["base"] + 1e-4).all() and (found.values >= 0).all()
        assert "lower bound" in found.title
    assert found.values.max() > 0


def test_commitment_follows_its_rule_and_layer_numbers(prompts):
    trace = prompts["half"][0]
    ids = np.array([[[1, 2, 3]], [[9, 1, 3]], [[9, 8, 1]], [[1, 9, 8]]], dtype=np.int32).repeat(2, 1)
    probs = np.array([[[0.9, 0.05, 0]], [[0.6, 0.1, 0]], [[0.6, 0.1, 0]], [[0.5, 0.1, 0]]], dtype=np.float32).repeat(
        2, 1
    )
    layers = np.array([2, 4, 6, 8], dtype=np.int32)
    made = dataclasses.replace(trace, top_ids=ids, top_probs=probs, layers=layers, trajectories=())
    assert find_commitment(made, "top1").tolist() == [8, 8]
    assert find_commitment(made, "top3").tolist() == [2, 2]
    assert np.isnan(find_commitment(made, "half")).all()
    with pytest.raises(DataError, match="no commitment rule"):
        find_commitment(made, "most")
    narrow = dataclasses.replace(made, top_ids=ids[..., :2].copy(), top_probs=probs[..., :2].copy())
    with pytest.raises(DataError, match="needs 3 top tokens"):
        find_commitment(narrow, "top3")


def test_strips_put_variants_under_each_other(prompts):
    traces = [prompts[name][0] for name in ("base", "tuned", "half")]
    found = commitment_strips(traces)
    assert found.rows == ("base", "tuned", "half") and found.title == RULES["top1"] and found.unit == "layer"
    np.testing.assert_array_equal(found.values[1], find_commitment(traces[1]))
    assert found.texts[2][0] == f"w{traces[2].top_ids[-1, 0, 0]}"
    with pytest.raises(DataError, match="at least one variant"):
        commitment_strips([])


def test_prompts_that_cannot_be_put_together_are_refused(prompts):
    with pytest.raises(DataError, match="at least one prompt"):
        collect([], "entropy")
    with pytest.raises(DataError, match="2 positions, and number 2"):
        collect(prompts["half"], "entropy", 2)
    with pytest.raises(DataError, match="pair them by prompt"):
        kept_output(prompts["half"], prompts["base"][1:], "tuned")
    with pytest.raises(DataError, match="same cells"):
        kept_output(prompts["half"], prompts["base"][::-1], "tuned")


def test_labelled_arrays_refuse_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="2 rows and 1 columns"):
        Grid(np.zeros((2, 2)), ("0", "1"), ("a",), "", "t")
    with pytest.raises(ValueError, match="texts"):
        Grid(np.zeros((1, 2)), ("0",), ("a", "b"), "", "t", (("x",),))
    with pytest.raises(ValueError, match="one median"):
        Bands(np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(3), "", "t", np.zeros(2, dtype=np.int64))
