"""Deltas of layers and of their parts in another variant: mixtures, and what they restore."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lens_families import build_family
from lens_planted import BOTH, MARGIN, PLANTED, build, change_lists, disturb, texts

from deltakeeper.apply import iterate_changes
from deltakeeper.artifact import open_artifact
from deltakeeper.attach import attached
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import LensError
from deltakeeper.lens import Variants, weights_of
from deltakeeper.lens.changes import mix, mixtures
from deltakeeper.lens.delta_patching import sweep_deltas
from deltakeeper.lens.modules import layer_tensors, part_tensors
from deltakeeper.lens.patching import Patching, sweep_streams
from deltakeeper.lens.restored import Place
from deltakeeper.testing import write_pair

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def planted():
    base = build()
    return base, disturb(base, [PLANTED])


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


def test_a_variants_own_deltas_change_nothing_and_directions_mirror(planted):
    base, tuned = planted
    (ids, mask), changes = texts(), change_lists(base, ("tuned", tuned))
    for grain in ("layer", "part"):
        own = sweep_deltas(base, changes, ids, mask, donor="tuned", receiver="tuned", outcome=MARGIN, grain=grain)
        assert np.array_equal(own.patched, np.repeat(own.corrupted[:, None], len(own.places), 1))
    back = sweep_deltas(base, changes, ids, mask, donor="tuned", receiver="base", outcome=MARGIN)
    assert back.restored() == pytest.approx([0, 0, 1, 0, 0], abs=1e-4)
    with pytest.raises(LensError, match="do not fit a model of 4 layers"):
        sweep_deltas(base, changes, ids, mask, **BOTH, layers=[4])
