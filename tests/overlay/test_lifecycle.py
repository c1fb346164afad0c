"""Tenants come and go: all of one or nothing, every byte counted, and the model as it was afterwards."""

from __future__ import annotations

import gc
import json
import math
import shutil
import threading

import pytest
import torch
from tenants import family, groups_of, ids, logits, mixed

from deltakeeper.artifact import SIDE_FILES, open_artifact
from deltakeeper.errors import OverlayError
from deltakeeper.kernels.terms import held_terms as count_held_terms
from deltakeeper.overlay import attach


def held_terms():
    gc.collect()  # those of tests before this one, whose models went out of use without being closed
    return count_held_terms()


@pytest.fixture
def models(tmp_path):
    return family("qwen2", tmp_path)


def test_detach_leaves_modules_parameters_and_bits_as_they_were(models):
    live, tokens = models.live(), ids(2)
    before, bits = logits(live, tokens), {k: v.clone() for k, v in live.state_dict().items()}
    modules, parameters = list(live.modules()), {k: id(v) for k, v in live.named_parameters()}
    attributes = {m: set(m.__dict__) for m in modules}
    overlay = attach(live)
    slot = overlay.publish(overlay.load(models.tune("a", "bitdelta")))
    assert not torch.equal(mixed(overlay, [slot, 0], tokens), before)
    assert list(live.state_dict()) == list(bits)
    overlay.detach()
    assert list(live.modules()) == modules
    assert {k: id(v) for k, v in live.named_parameters()} == parameters
    assert {m: set(m.__dict__) for m in modules} == attributes
    assert all(torch.equal(live.state_dict()[k], v) for k, v in bits.items())
    assert torch.equal(logits(live, tokens), before)
    with pytest.raises(OverlayError, match="detached"), overlay.rows(groups_of([0, 0])):
        pass
    attach(live).detach()


def test_slots_are_given_again_and_hold_nothing_of_who_left(models):
    live, tokens = models.live(), ids(2)
    overlay = attach(live)
    a, b = (overlay.load(models.tune(name, "bitdelta+svd:rank=1", seed=i, extra=i)) for i, name in enumerate("ab"))
    alone = {}
    for delta in (a, b):
        slot = overlay.publish(delta)
        alone[delta] = mixed(overlay, [slot, slot], tokens)
        assert overlay.retire(slot) is delta and delta.slot is None
    assert overlay.publish(b) == 1 and overlay.publish(a) == 2
    known = alone[a].shape[-1]
    assert torch.equal(mixed(overlay, [2, 2], tokens)[..., :known], alone[a])
    overlay.retire(1)
    assert overlay.vocabulary == known  # that of the base: the larger one left
    with pytest.raises(OverlayError, match="slot 1 holds no tenant"):
        mixed(overlay, [1, 0], tokens)
    with pytest.raises(OverlayError, match="slot 1 holds no tenant"):
        overlay.retire(1)
    third = models.tune("c", "svd:rank=2", seed=5, norms="base")
    assert overlay.publish(overlay.load(third)) == 1
    fresh = attach(models.live())
    true = mixed(fresh, [fresh.publish(fresh.load(third)), 0], tokens)
    assert torch.equal(mixed(overlay, [1, 0], tokens), true)


def test_more_tenants_than_there_was_room_for(models):
    live, tokens = models.live(), ids(1)
    overlay = attach(live)
    artifact = models.tune("a", "bitdelta")
    slots = [overlay.publish(overlay.load(artifact)) for _ in range(12)]
    assert slots == list(range(1, 13))
    first = mixed(overlay, [1], tokens)
    deeper = overlay.publish(overlay.load(models.tune("b", "bitdelta+svd:rank=1+svd:rank=1")))
    assert torch.equal(mixed(overlay, [12], tokens), first) and torch.equal(mixed(overlay, [1], tokens), first)
    assert not torch.equal(mixed(overlay, [deeper], tokens), first)


def test_every_term_is_released_and_every_byte_counted(models):
    start = held_terms()
    artifact = models.tune("a", "bitdelta:bits=2", extra=4)
    overlay = attach(models.live())
    delta, coarse = overlay.load(artifact), overlay.load(artifact, planes=1)
    assert held_terms() > start
    assert delta.version != coarse.version and len(delta.version) == 64
    assert overlay.load(open_artifact(artifact.path)).version == delta.version
    packed = sum(t.nbytes for name in artifact.names for t in artifact.terms(name) if not t.replaces)
    values = sum(t.nbytes for name in artifact.names for t in artifact.terms(name) if t.replaces)
    added = sum(r.added_rows * r.shape[1] * 4 for r in artifact.manifest.tensors.values() if r.added_rows)
    assert delta.nbytes >= packed + values + added
    assert delta.nbytes <= 3 * (packed + values) + added
    assert coarse.nbytes < delta.nbytes
    slot = overlay.publish(delta)
    with pytest.raises(OverlayError, match="retire it before"):
        delta.close()
    with pytest.raises(OverlayError, match="published in slot 1 already"):
        overlay.publish(delta)
    overlay.retire(slot).close()
    coarse.close()
    coarse.close()
    with pytest.raises(OverlayError, match="closed"):
        overlay.publish(delta)
    assert held_terms() == start


def test_a_failure_while_publishing_leaves_no_trace(models, monkeypatch):
    live, tokens = models.live(), ids(2)
    overlay = attach(live)
    delta = overlay.load(models.tune("a", "bitdelta", extra=2))
    base = mixed(overlay, [0, 0], tokens)
    last = list(delta.parts)[-1]
    put = last.put

    def fail(slot, part):
        if part is not None:
            raise MemoryError
        put(slot, part)

    monkeypatch.setattr(last, "put", fail)
    with pytest.raises(MemoryError):
        overlay.publish(delta)
    assert delta.slot is None and not overlay.published
    assert torch.equal(mixed(overlay, [0, 0], tokens), base)
    monkeypatch.undo()
    assert overlay.publish(delta) == 1


def rewrite_config(artifact, config, **changes):
    settings = config.to_dict() | changes
    (artifact.path / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters.rope_theta"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 24}, "head_dim"),
        ({"use_sliding_window": True}, "sliding_window"),
        ({"model_type": "llama"}, "model_type"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused_by_its_key(models, changes, key):
    overlay = attach(models.live())
    artifact = models.tune("a", "bitdelta")
    start = held_terms()
    rewrite_config(artifact, overlay.model.config, **changes)
    with pytest.raises(OverlayError, match=f"config.json sets '[a-z_.]*{key}'|'layer_types'"):
        overlay.load(artifact)
    assert held_terms() == start
    rewrite_config(artifact, overlay.model.config, eos_token_id=5, use_cache=False, some_note="x", dtype="float16")
    overlay.load(artifact).close()
    (artifact.path / "config.json").write_text("[1]")
    with pytest.raises(OverlayError, match="not an object"):
        overlay.load(artifact)


def test_a_delta_of_another_model_is_refused_and_nothing_is_held(models, tmp_path):
    other = family("llama_odd", tmp_path / "other")
    overlay = attach(models.live())
    start, base = held_terms(), mixed(overlay, [0], ids(1))
    foreign = other.tune("a", "bitdelta")
    (foreign.path / "config.json").unlink(missing_ok=True)
    with pytest.raises(OverlayError, match=r"does not fit|does not say|no place"):
        overlay.load(foreign)
    assert held_terms() == start and torch.equal(mixed(overlay, [0], ids(1)), base)
    with pytest.raises(OverlayError, match="another overlay"):
        overlay.publish(attach(models.live()).load(models.tune("b", "bitdelta")))
    with pytest.raises(OverlayError, match="attached to this model already"):
        attach(overlay.model)
    with pytest.raises(OverlayError, match="9 sign planes were asked for and it has 1 to 1"):
        overlay.load(models.tune("c", "bitdelta"), planes=9)


def test_rows_that_do_not_fit_are_named(models):
    live, tokens = models.live(), ids(3)
    overlay = attach(live)
    with (
        overlay.rows(groups_of([0, 0])),
        pytest.raises(OverlayError, match="is given 27 rows but the pass was told of 18"),
    ):
        live(tokens)
    with (
        overlay.rows(groups_of([0, 0, 0])),
        pytest.raises(OverlayError, match="under way"),
        overlay.rows(groups_of([0])),
    ):
        pass
    with overlay.rows(groups_of([0, 0, 0])), pytest.raises(OverlayError, match=r"head is given 3 rows.*head="):
        live(tokens, logits_to_keep=1)


def test_the_head_on_some_of_the_rows(models):
    live, tokens = models.live(), ids(3)
    overlay = attach(live)
    slots = [overlay.publish(overlay.load(models.tune("a", "bitdelta", extra=3))), 0, 1]
    whole = mixed(overlay, slots, tokens)
    with overlay.rows(groups_of(slots), head=groups_of(slots, 1)):
        last = live(tokens, logits_to_keep=1).logits
    assert last.shape == (3, 1, 99)
    assert torch.allclose(last[:, 0], whole[:, -1], atol=1e-5)
    assert torch.all(last[1, 0, 96:] == -math.inf) and torch.all(last[0].isfinite())
    with overlay.rows(groups_of(slots)), pytest.raises(OverlayError, match="token 97 is beyond the 96"):
        live(torch.full_like(tokens, 97))


def test_slots_that_were_written_in_inference_mode_can_be_written_outside_of_it(models):
    live, tokens = models.live(), ids(2)
    with torch.inference_mode():
        overlay = attach(live)
        slot = overlay.publish(overlay.load(models.tune("a", "bitdelta")))
        first = mixed(overlay, [slot, 0], tokens)
    delta = overlay.retire(slot)
    assert torch.equal(mixed(overlay, [overlay.publish(delta), 0], tokens), first)


def test_loading_beside_passes_gives_what_loading_alone_gives(models):
    live, tokens = models.live(), ids(2)
    overlay = attach(live)
    artifact = models.tune("a", "bitdelta")
    slot = overlay.publish(overlay.load(artifact))
    true = mixed(overlay, [slot, 0], tokens)
    loaded, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            loaded.append(overlay.load(artifact))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        results = [mixed(overlay, [slot, 0], tokens) for _ in range(60)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(result, true) for result in results)
    assert loaded and {delta.nbytes for delta in loaded} == {overlay.published[slot].nbytes}
    assert torch.equal(mixed(overlay, [overlay.publish(loaded[-1]), 0], tokens), true)


def test_a_version_is_what_is_served_not_where_it_lies(models, tmp_path):
    overlay = attach(models.live())
    artifact, other = models.tune("a", "bitdelta:bits=2"), models.tune("b", "bitdelta:bits=2", seed=1)
    shutil.copytree(artifact.path, tmp_path / "copy")
    versions = [overlay.load(a, planes=p).version for a in (artifact, other) for p in (None, 1, 2)]
    assert len(set(versions)) == 6
    assert overlay.load(open_artifact(tmp_path / "copy"), planes=1).version == versions[1]
    delta = overlay.load(artifact)
    assert delta.side_folder == artifact.path
    assert set(delta.side_files) == {f.name for f in artifact.path.iterdir() if f.name in SIDE_FILES}


def test_merged_tiles_for_long_prompts_are_near_the_terms_apart(tmp_path):
    models = family("llama", tmp_path, torch.bfloat16)
    artifact, tokens = models.tune("a", "bitdelta"), ids(2)
    found = []
    for merge_from in (None, 4):
        overlay = attach(models.live(), merge_from=merge_from)
        found.append(mixed(overlay, [overlay.publish(overlay.load(artifact)), 0], tokens))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.allclose(found[0], found[1], atol=0.05)
