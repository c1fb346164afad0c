"""Patching of streams and of deltas finds the layer that carries an effect, and changes nothing where it must not."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from lens_families import build_family, sample_ids

from deltakeeper.apply import iterate_changes
from deltakeeper.artifact import open_artifact
from deltakeeper.attach import Change, attached
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import DataError, DeltakeeperError, LensError
from deltakeeper.lens import Models, Variants, capture, find_blocks, weights_of
from deltakeeper.lens.changes import mix, mixtures
from deltakeeper.lens.delta_patching import sweep_deltas
from deltakeeper.lens.modules import layer_tensors, part_tensors
from deltakeeper.lens.outcomes import token_margin, token_mass
from deltakeeper.lens.patching import Patching, derange, sweep_streams, sweep_with_controls
from deltakeeper.lens.ranking import LayerRanking, rank_places
from deltakeeper.lens.restored import Place, Sweep, windows_of
from deltakeeper.testing import write_pair

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS, PLANTED = 4, 2
MARGIN = token_margin([5, 6], [7, 8])
BOTH = {"donor": "base", "receiver": "tuned", "outcome": MARGIN}


def build(kind="llama"):
    count = {"num_hidden_layers": LAYERS, "attention_types": [[["global", "local"], 2]]}
    return build_family(kind, **{k: v for k, v in count.items() if k != "attention_types" or kind == "gpt_neo"})


def disturb(model, layers, seed=1, part=""):
    """A copy whose blocks of some layers have other weights."""
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for name, parameter in find_blocks(found)[layer].named_parameters():
                if part in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def texts(rows=4):
    ids, mask = sample_ids(rows), torch.ones(rows, 7, dtype=torch.int64)
    mask[0, :3] = 0  # padded on the left
    return ids, mask


@pytest.fixture(scope="module")
def planted():
    base = build()
    return base, disturb(base, [PLANTED])


def change_lists(base, *others):
    return {"base": [], **{name: weights_of(model) for name, model in others}}


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


@pytest.mark.parametrize(("kind", "part"), [("llama", "self_attn"), ("gpt2", "mlp"), ("gemma2", "mlp")])
def test_parts_of_a_layer_are_told_apart(kind, part):
    base = build_family(kind)
    tuned, (ids, mask) = disturb(base, [1], part=part), texts()
    found = sweep_deltas(base, change_lists(base, ("tuned", tuned)), ids, mask, **BOTH, grain="part", floor=1e-5)
    labels = [place.label for place in found.places]
    assert labels == ["0 attention", "0 mlp", "1 attention", "1 mlp", "outside"]
    expected = [float(label == ("1 mlp" if part == "mlp" else "1 attention")) for label in labels]
    assert found.restored() == pytest.approx(expected, abs=1e-2)
    assert len(found.only("mlp").bands().median) == 2
    with pytest.raises(LensError, match="places of one kind"):
        found.bands()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "bloom", "mixtral", "falcon", "jamba", "opt"])
def test_every_tensor_has_one_place(kind):
    model = build_family(kind)
    names = sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    for places in (layer_tensors(model), part_tensors(model)):
        assert sorted(name for found in places.values() for name in found) == names
    for place, found in part_tensors(model).items():
        for name in found:
            if any(word in name for word in ("attn.", "attention.", "mamba")) and place.layers and "norm" not in name:
                assert place.patched == "attention", name
            if any(word in name for word in ("mlp.", "feed_forward", "experts", "fc1", "fc2", "mlp.gate")):
                assert place.patched == "mlp", name


def test_a_mixture_is_the_model_built_with_those_tensors(planted):
    base, tuned = planted
    other, (ids, _) = disturb(base, [0, 3], seed=5), texts()
    changes = change_lists(base, ("tuned", tuned), ("other", other))
    tensors = layer_tensors(base)
    plain = base(ids).logits
    for place, mixture in mixtures(changes, "other", "tuned", tensors):
        built = copy.deepcopy(tuned)
        state = built.state_dict()
        state.update({name: other.state_dict()[name] for name in tensors[place]})
        built.load_state_dict(state)
        with attached(base, mixture):
            assert torch.equal(base(ids).logits, built(ids).logits), place
    for name in tensors[Place("layer", (0,))]:
        assert name not in {change.name for change in mix(changes["tuned"], [], tensors[Place("layer", (0,))])}
    assert torch.equal(base(ids).logits, plain)


def test_deltas_of_artifacts_and_live_variants(tmp_path):
    from transformers import AutoModelForCausalLM

    folders = write_pair("llama", tmp_path, dtype=torch.float32, scale=0.1)
    compress(*folders, tmp_path / "one", "bitdelta")
    artifact, (ids, mask) = open_artifact(tmp_path / "one"), texts()
    base, tuned = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval() for folder in folders)
    with Variants(base, {"one": artifact}, whole={"tuned": weights_of(tuned)}, prompts_per_pass=3) as variants:
        how = Patching(floor=1e-3, prompts_per_pass=3)
        found = sweep_streams(variants, ids, mask, donor="one", receiver="tuned", outcome=MARGIN, how=how)
        back = sweep_streams(variants, ids, mask, donor="tuned", receiver="one", outcome=MARGIN, how=how)
        with pytest.raises(LensError, match="no variant 'nobody'"), variants.serving("nobody"):
            pass
    assert found.clean == pytest.approx(back.corrupted, abs=1e-6)
    assert found.patched.shape == (4, 2)
    with open_checkpoint(folders[0]) as checkpoint:
        changes = {"base": [], "one": list(iterate_changes(checkpoint, artifact)), "tuned": weights_of(tuned)}
    deltas = sweep_deltas(base, changes, ids, mask, donor="tuned", receiver="one", outcome=MARGIN, prompts_per_pass=3)
    assert deltas.clean == pytest.approx(found.corrupted, abs=1e-4)
    assert deltas.corrupted == pytest.approx(found.clean, abs=1e-4)


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


def test_shares_are_ratios_of_sums():
    places = (Place("layer", (0,)), Place("layer", (1,)))
    patched = np.array([[0.2, 0.9], [0.3, 0.5], [0.5, 0.5]])
    sweep = Sweep(places, patched, np.array([1.0, 0.6, 0.505]), np.array([0.1, 0.2, 0.5]), "base", "tuned", "t")
    assert sweep.ratios()[:2] == pytest.approx(np.array([[0.1 / 0.9, 0.8 / 0.9], [0.25, 0.75]]))
    assert np.isnan(sweep.ratios()[2]).all()
    assert sweep.restored() == pytest.approx([0.2 / 1.305, 1.1 / 1.305])
    counts = np.array([[2, 1, 0], [0, 0, 3], [1, 1, 1]])
    drawn = sweep.restored(counts)
    assert drawn[0] == pytest.approx([0.3 / 2.2, 1.9 / 2.2])
    assert np.isnan(drawn[1]).all() and drawn[2] == pytest.approx(sweep.restored())
    assert sweep.gained() == pytest.approx([0.2 / 1.305, 0.9 / 1.305])
    with pytest.raises(LensError, match="not of 3 prompts"):
        sweep.restored(np.ones((2, 4)))
    with pytest.raises(ValueError, match="a sweep needs"):
        Sweep(places, patched[:, :1], sweep.clean, sweep.corrupted, "base", "tuned", "t")


def test_rankings_are_plain_and_read_strictly():
    generator = np.random.default_rng(0)
    places = tuple(Place("attention", (layer, layer + 1)) for layer in range(3))
    effect = np.array([0.1, 0.8, 0.4])
    clean = 0.8 + 0.1 * generator.random(40)
    patched = effect * clean[:, None] + 0.02 * generator.standard_normal((40, 3))
    sweep = Sweep(places, patched, clean, np.zeros(40), "base", "tuned", "t")
    counts = generator.multinomial(40, np.full(40, 1 / 40), size=200)
    ranking = rank_places(sweep, counts)
    assert [entry.place.layers[0] for entry in ranking.places] == [1, 2, 0]
    assert all(entry.low < entry.share < entry.high and entry.high - entry.low < 0.05 for entry in ranking.places)
    value = json.loads(json.dumps(ranking.to_json(), allow_nan=False))
    assert LayerRanking.from_json(value) == ranking and ranking.prompts == 40
    flat = rank_places(Sweep(places, patched, clean, clean, "base", "tuned", "t"), counts)
    assert [entry.share for entry in flat.places] == [None] * 3 and flat.places[0].low is None
    assert LayerRanking.from_json(flat.to_json()) == flat
    for key, wrong in (("version", 2), ("prompts", -1), ("donor", 3), ("share", "all"), ("places", {}), ("more", 1)):
        with pytest.raises(DataError, match="no sound ranking"):
            LayerRanking.from_json({**value, key: wrong})
    for key, wrong in (("share", float("nan")), ("layers", [-1]), ("layers", 3), ("patched", "all"), ("low", "0")):
        with pytest.raises(DataError, match="no sound ranking"):
            LayerRanking.from_json({**value, "places": [{**value["places"][0], key: wrong}]})


def test_outcomes_by_brute_force():
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    assert torch.allclose(token_mass([1, 4, 4])(logits), (p[..., 1] + p[..., 4]).mean(1))
    odds = ((p[..., 1] + p[..., 2]) / p[..., 3]).log().mean(1)
    assert torch.allclose(token_margin([1, 2], [3])(logits), odds, atol=1e-5)
    for wrong in (lambda: token_mass([]), lambda: token_margin([1], [1])):
        with pytest.raises(LensError):
            wrong()


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
