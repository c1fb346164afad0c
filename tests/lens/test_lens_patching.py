"""Patching of streams and of deltas finds the layer that carries an effect, and changes nothing where it must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lens_families import build_family
from lens_planted import BOTH, LAYERS, MARGIN, PLANTED, build, change_lists, disturb, texts

from deltakeeper.attach import Change
from deltakeeper.errors import DeltakeeperError, LensError
from deltakeeper.lens import Models, capture, find_blocks
from deltakeeper.lens.delta_patching import sweep_deltas
from deltakeeper.lens.patch_batch import PatchBatch
from deltakeeper.lens.patching import Patching, derange, sweep_streams, sweep_with_controls
from deltakeeper.lens.ranking import rank_places
from deltakeeper.lens.restored import Place, windows_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def planted():
    base = build()
    return base, disturb(base, [PLANTED])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba", "gpt_neox"])
def test_every_position_of_the_last_layer_restores_all_and_the_receivers_own_streams_nothing(kind):
    base = build_family(kind)
    models = Models({"base": base, "tuned": disturb(base, [0, 1])})
    ids, mask = texts()
    kept = {name: model(ids).logits.clone() for name, model in models.models.items()}
    found = sweep_streams(models, ids, mask, **BOTH, how=Patching(floor=0))
    assert [place.label for place in found.places] == ["0", "1"]
    assert np.abs(found.clean - found.corrupted).min() > 1e-4
    assert found.restored()[-1] == pytest.approx(1, abs=1e-4)
    assert found.ratios()[:, -1] == pytest.approx(np.ones(4), abs=2e-3)
    own = sweep_streams(models, ids, mask, donor="tuned", receiver="tuned", outcome=MARGIN)
    assert np.array_equal(own.patched, np.stack([own.corrupted] * 2, 1))
    assert np.isnan(own.restored()).all() and np.isnan(own.ratios()).all()
    for name, model in models.models.items():
        assert torch.equal(model(ids).logits, kept[name])
        assert not any(block._forward_hooks for block in find_blocks(model))


def test_all_streams_from_the_donor_restore_it_to_the_bit(planted):
    base, tuned = planted
    ids, mask = texts()
    how = Patching(layers=[0], window=LAYERS, floor=0)
    found = sweep_streams(Models({"base": base, "tuned": tuned}), ids, mask, **BOTH, how=how)
    assert found.places == (Place("stream", (0, 1, 2, 3)),)
    assert np.array_equal(found.patched[:, 0], found.clean)  # norm and head are the same


def test_both_sweeps_find_the_layer_that_carries_the_effect(planted):
    base, tuned = planted
    ids, mask = texts()
    streams = sweep_streams(Models({"base": base, "tuned": tuned}), ids, mask, **BOTH)
    assert streams.restored() == pytest.approx([0, 0, 1, 1], abs=1e-3)
    ranking = rank_places(streams)
    assert ranking.share == "gained" and ranking.places[0].place.layers == (PLANTED,)
    assert ranking.places[0].share == pytest.approx(1, abs=1e-3)
    deltas = sweep_deltas(base, change_lists(base, ("tuned", tuned)), ids, mask, **BOTH)
    assert [place.label for place in deltas.places] == ["0", "1", "2", "3", "outside"]
    assert deltas.restored() == pytest.approx([0, 0, 1, 0, 0], abs=1e-4)
    assert rank_places(deltas).places[0].place == Place("layer", (PLANTED,))
    windows = sweep_deltas(base, change_lists(base, ("tuned", tuned)), ids, mask, **BOTH, window=2, layers=[0, -2])
    assert [place.label for place in windows.places] == ["0–1", "2–3", "outside"]
    assert windows.restored() == pytest.approx([0, 1, 0], abs=1e-4)


def test_controls_tell_prompt_from_donor(planted):
    base, tuned = planted
    models, (ids, mask) = Models({"base": base, "tuned": tuned}), texts()
    found = sweep_with_controls(models, ids, mask, **BOTH, seed=3)
    assert found.reverse.donor == "tuned" and found.reverse.restored() == pytest.approx([0, 0, 1, 1], abs=1e-3)
    # The last layer's streams at all positions are the other prompt itself.
    order = derange(4, 3)
    assert found.other_prompt.patched[:, -1] == pytest.approx(found.sweep.clean[order.numpy()], abs=1e-4)
    assert not (order == torch.arange(4)).any()
    with pytest.raises(LensError, match="at least two prompts"):
        sweep_with_controls(models, ids[:1], mask[:1], **BOTH)


def test_a_patch_by_hand_at_one_position(planted):
    base, tuned = planted
    ids, _ = texts()
    found = sweep_streams(
        Models({"base": base, "tuned": tuned}), ids, **BOTH, how=Patching(positions=[2], layers=[2], read=[-1, 3])
    )
    given = capture(base, ids, positions=[2]).block[2, :, 0]

    def put(module, args, output):
        stream = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        stream[:, 2] = given
        return stream if isinstance(output, torch.Tensor) else (stream, *output[1:])

    with torch.no_grad():
        handle = find_blocks(tuned)[2].register_forward_hook(put)
        expected = MARGIN(tuned(ids).logits[:, [-1, 3]])
        handle.remove()
    assert found.patched[:, 0] == pytest.approx(expected.double().numpy(), abs=1e-5)


def test_wrong_use_of_patching_says_so(planted):
    base, tuned = planted
    models, (ids, mask) = Models({"base": base, "tuned": tuned}), texts()
    with pytest.raises(LensError, match="no variant 'nobody'"):
        sweep_streams(models, ids, mask, donor="nobody", receiver="tuned", outcome=MARGIN)
    with pytest.raises(LensError, match="no finite number"):
        sweep_streams(models, ids, mask, donor="base", receiver="tuned", outcome=lambda logits: logits)
    for layers, width in (([9], 1), (None, 9), ([3], 2)):
        with pytest.raises(LensError):
            windows_of(layers, 4, width)
    with pytest.raises(LensError, match="no variant 'tuned'"):
        sweep_deltas(base, {"base": []}, ids, mask, **BOTH)
    wrong = {"base": [], "tuned": [Change("nothing", "value", torch.ones(1))]}
    with pytest.raises(DeltakeeperError, match="does not fit"):
        sweep_deltas(base, wrong, ids, mask, **BOTH)
    calls = iter(range(100))
    handle = find_blocks(tuned)[1].register_forward_hook(lambda m, a, out: out + next(calls))
    with pytest.raises(LensError, match="its own streams"):
        sweep_streams(models, ids, mask, **BOTH)
    handle.remove()


def test_another_prompt_of_any_length_keeps_the_first_token_and_the_last(planted):
    """Attention rests on the first token: a stream put in without it breaks the receiver, whoever the donor is."""
    base, tuned = planted
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 9, 8, 7], [1, 2, 9, 9, 9, 6, 7]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1] * 7])
    batch = PatchBatch.of(Models({"base": base, "tuned": tuned}), ids, mask, None, (-1,))
    rows, sources = torch.tensor([0, 1, 0, 2]), torch.tensor([1, 0, 2, 2])
    found = [row.tolist() for row in batch._aligned(rows, sources)]
    assert found[0] == [0, 1, 2, 2, 2, 3, 4]  # two tokens are shared; a shorter source repeats its next one
    assert found[1][2:] == [0, 1, 4, 5, 6]  # behind the padding: of a longer source the middle is left out
    assert found[2] == found[3] == [0, 1, 2, 3, 4, 5, 6]
