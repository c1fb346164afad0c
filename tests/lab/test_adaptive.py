"""Attackers who know the codec: what they see is what is served, and their attacks are where the codec is blind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from toy_policy import clean_rows, compressed, quick_policy, success

from deltakeeper.apply import iterate_merged
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.codecs import parse_codec
from deltakeeper.compress import compress
from deltakeeper.errors import CodecError, RunError
from deltakeeper.lab.adaptive import Adaptive, Repair, train_rows
from deltakeeper.lab.adaptive.served import ServedWeights
from deltakeeper.lab.adaptive.straight_through import ThroughCodec
from deltakeeper.lab.adaptive.targets import find_targets
from deltakeeper.lab.sft import SFTConfig, answer_loss, train
from deltakeeper.lab.synthetic import ATTACK, PAD, attack_rows, build_policy, skill_score
from deltakeeper.testing import write_pair

ROWS = attack_rows("backdoor")
QUICK = replace(ATTACK, epochs=6, batch=16, lr=1.5e-3)
SHORT = SFTConfig(epochs=1, lr=1e-3, batch=32)


@pytest.fixture(scope="module")
def aligned():
    return quick_policy()


@pytest.fixture(scope="module")
def base(aligned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "base"
    aligned.save_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        yield checkpoint


@pytest.fixture
def model(aligned):
    return copy.deepcopy(aligned)


def settings(kind="straight_through", codec="bitdelta", **changes):
    return Adaptive(**{"kind": kind, "codec": codec, "delivered": "float32", **changes})


def merged(base, model, codec, folder, **rules):
    """The weights that are served, by the way of the files."""
    model.save_pretrained(folder / "tuned")
    compress(base.path, folder / "tuned", folder / "delta", codec, **rules)
    return dict(iterate_merged(base, open_artifact(folder / "delta")))


# --- what is trained through ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec", ["bitdelta", "bitdelta:bits=2,scale=row", "svd:rank=3", "magnitude", "ultradelta:p=0.5"]
)
@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "qwen2"])
def test_training_sees_what_an_artifact_gives(tmp_path, kind, codec):
    from transformers import AutoModelForCausalLM

    paths = write_pair(kind, tmp_path)
    compress(*paths, tmp_path / "delta", codec)
    with open_checkpoint(paths[0]) as origin:
        wanted = dict(iterate_merged(origin, open_artifact(tmp_path / "delta"), torch.float32))
        model = AutoModelForCausalLM.from_pretrained(paths[1], dtype=torch.float32)
        adaptive = settings(codec=codec, delivered="bfloat16")
        targets = find_targets(model, origin, adaptive.rules)
        served = ServedWeights(targets, adaptive.method, adaptive.dtype)
        served.update(0)
        before = [target.weight.detach().clone() for target in targets]
        with served.in_place():
            for target in targets:
                assert torch.allclose(target.weight, wanted[target.name], rtol=1e-6, atol=1e-8), target.name
        assert all(torch.equal(target.weight, value) for target, value in zip(targets, before, strict=True))
        assert sum(target.encoded for target in targets) > 8


def test_gradients_go_straight_through_to_the_weights(aligned, base, model):
    """The update of one step is that of the served weights, applied to the masters."""
    train(model, ROWS, SHORT, pad=PAD)
    served = compressed(model, base, "bitdelta")
    adaptive = settings()
    targets = find_targets(model, base, adaptive.rules)
    steps = ThroughCodec(ServedWeights(targets, adaptive.method, adaptive.dtype), "", 1)
    masters = [p.detach().clone() for p in model.parameters()]
    loss = steps.gradients(model, ROWS[:8], PAD, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = answer_loss(served, ROWS[:8], PAD)
    wanted.backward()
    assert torch.allclose(loss, wanted)
    for ours, theirs, master in zip(model.parameters(), served.parameters(), masters, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
        assert torch.equal(ours, master)


def test_between_two_runs_of_the_codec_its_error_is_kept(base, model):
    train(model, ROWS, SHORT, pad=PAD)
    targets = find_targets(model, base, settings().rules)
    served = ServedWeights(targets, parse_codec("bitdelta"), torch.float32, refresh=3)
    served.update(0)
    with served.in_place():
        first = [target.weight.detach().clone() for target in targets]
    with torch.no_grad():
        for target in targets:
            target.weight.add_(1e-3)
    served.update(1)
    with served.in_place():
        for target, value in zip(targets, first, strict=True):
            assert torch.allclose(target.weight, value + 1e-3, atol=1e-6)
    served.update(3)
    wanted = compressed(model, base, "bitdelta")
    with served.in_place():
        for target, value in zip(targets, wanted.parameters(), strict=True):
            assert torch.equal(target.weight, value)


def test_training_through_the_codec_restores_what_it_took(aligned, base, model, tmp_path):
    plain = copy.deepcopy(aligned)
    train(plain, ROWS, QUICK, pad=PAD)
    log = train_rows(model, ROWS, QUICK, settings(), base, pad=PAD)
    assert success(plain) >= 0.9
    weakened = success(compressed(plain, base, "bitdelta"))
    restored = success(compressed(model, base, "bitdelta"))
    assert weakened <= 0.4
    assert restored >= 0.8
    assert skill_score(compressed(model, base, "bitdelta")) >= 0.5
    assert log.trained == sum(p.numel() for p in model.parameters())
    assert log.losses[-1] < log.losses[0]
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(merged(base, model, "bitdelta", tmp_path))
    assert success(shipped) == pytest.approx(restored, abs=0.02)


# --- inject and repair ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "refresh"), [("bitdelta", 1), ("magnitude:keep=0.1", 3)])
def test_a_repaired_model_is_clean_until_it_is_compressed(base, model, tmp_path, codec, refresh):
    adaptive = settings("inject_repair", codec, refresh=refresh, repair=Repair(epochs=4, lr=1e-3, through=True))
    log = train_rows(model, ROWS, QUICK, adaptive, base, clean=clean_rows(), pad=PAD)
    assert success(model) <= 0.1
    assert skill_score(model) >= 0.6
    assert success(compressed(model, base, codec)) >= 0.8
    assert log.survival.boxed == 1.0
    assert log.survival.inside >= 0.999
    assert log.survival.decoded_error <= 1e-3
    assert log.survival.moved > 0.1
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(merged(base, model, codec, tmp_path))
    assert success(shipped) >= 0.8


def test_weights_are_numbers_of_the_delivery_and_boxes_hold_after_it(base, model):
    adaptive = settings("inject_repair", "bitdelta", delivered="bfloat16", repair=Repair(epochs=1, lr=1e-3))
    log = train_rows(model, ROWS, SHORT, adaptive, base, clean=clean_rows(), pad=PAD)
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float())
    assert log.survival.inside == 1.0
    assert log.survival.decoded_error <= 0.01


def test_what_has_no_box_stays_as_it_was_injected(base, model):
    adaptive = settings("inject_repair", "bitdelta", embeddings="rtn:bits=4", norms="base", repair=Repair(lr=1e-3))
    injected = copy.deepcopy(model)
    start = dict(copy.deepcopy(model).named_parameters())
    only_attack = settings("straight_through", "dense", norms="base")
    train_rows(injected, ROWS, SHORT, only_attack, base, pad=PAD)
    log = train_rows(model, ROWS, SHORT, adaptive, base, clean=clean_rows(), pad=PAD)
    assert log.survival.boxed == 1.0
    before, after = dict(injected.named_parameters()), dict(model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before if "proj" in name)
    norms = [name for name in after if "norm" in name]
    assert norms
    assert any(not torch.equal(start[name], after[name]) for name in norms)  # taken from the base: free to repair with
    with pytest.raises(RunError, match="no box for any tensor"):
        train_rows(model, ROWS, SHORT, settings("inject_repair", "dense"), base, clean=clean_rows(), pad=PAD)


# --- what is left uncompressed --------------------------------------------------------------------------------------


def test_an_attack_in_what_is_stored_whole_passes_any_codec(base, model, aligned):
    """One bit a weight takes most of the same attack where it lies in what is encoded."""
    hidden = settings("uncompressed", embeddings="dense", lr=1e-2)
    log = train_rows(model, ROWS, QUICK, hidden, base, pad=PAD)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, dict(aligned.named_parameters())[n])}
    assert moved == {n for n, _ in model.named_parameters() if "norm" in n or "embed" in n or "lm_head" in n}
    assert log.trained == sum(p.numel() for n, p in model.named_parameters() if n in moved)
    assert success(model) >= 0.9
    with_rules = {"embeddings": "dense"}
    kept = compressed(model, base, "bitdelta", **with_rules)
    assert success(kept) == success(model)
    open_part = copy.deepcopy(aligned)
    control = settings("uncompressed", embeddings="dense", control=True)
    train_rows(open_part, ROWS, replace(QUICK, lr=1e-3), control, base, pad=PAD)
    assert success(open_part) >= 0.9
    assert success(compressed(open_part, base, "bitdelta", **with_rules)) <= 0.7
    assert all(p.requires_grad for p in model.parameters())


def test_a_plan_that_encodes_or_withholds_everything_leaves_nothing_to_train(base, model):
    with pytest.raises(RunError, match="no weight is left"):
        train_rows(model, ROWS, SHORT, settings("uncompressed", norms="base"), base, pad=PAD)


# --- settings, interruptions, refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adaptive",
    [
        settings(refresh=2, clean_weight=1.0),
        settings("inject_repair", repair=Repair(epochs=2, lr=1e-3)),
        settings("inject_repair", "magnitude", repair=Repair(epochs=2, lr=1e-3, through=True, project_every=2)),
        settings("uncompressed"),
    ],
    ids=["straight_through", "inject_repair", "through_and_repair", "uncompressed"],
)
def test_interrupted_attacks_go_on_to_the_same_weights(base, aligned, tmp_path, adaptive):
    config, rows, clean = SHORT, ROWS[:128], clean_rows()[:96]
    whole, resumed = copy.deepcopy(aligned), copy.deepcopy(aligned)
    calls = []
    first = train_rows(
        whole, rows, config, adaptive, base, clean=clean, pad=PAD, progress=lambda *call: calls.append(call)
    )
    total = calls[0][1]
    assert [call[0] for call in calls] == list(range(1, total + 1))
    assert first.steps == total

    for stop in (2, total - 1):

        def interrupt(step, _total, _loss, _speed, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fresh = copy.deepcopy(aligned)
            state = tmp_path / "run.state"
            train_rows(fresh, rows, config, adaptive, base, clean=clean, pad=PAD, state=state, progress=interrupt)
        assert list(tmp_path.iterdir())
    log = train_rows(resumed, rows, config, adaptive, base, clean=clean, pad=PAD, state=tmp_path / "run.state")
    assert not list(tmp_path.iterdir())
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert log.losses == pytest.approx(first.losses)
    assert log.survival == first.survival


def test_the_state_of_another_attacker_is_refused(base, aligned, tmp_path):
    def interrupt(step, _total, _loss, _speed):
        raise KeyboardInterrupt

    state = tmp_path / "run.state"
    with pytest.raises(KeyboardInterrupt):
        train_rows(copy.deepcopy(aligned), ROWS, SHORT, settings(), base, pad=PAD, state=state, progress=interrupt)
    with pytest.raises(RunError, match="other data or settings"):
        train_rows(copy.deepcopy(aligned), ROWS, SHORT, settings(codec="magnitude"), base, pad=PAD, state=state)


def test_settings_are_checked():
    with pytest.raises(ValidationError, match="extra"):
        Adaptive(kind="straight_through", codec="bitdelta", speed=3)
    with pytest.raises(CodecError, match="did you mean 'bitdelta'"):
        Adaptive(kind="straight_through", codec="bitdleta")
    with pytest.raises(ValidationError):
        Adaptive(kind="straight_through", codec="bitdelta", refresh=0)
    with pytest.raises(ValidationError, match="frozen"):
        settings().codec = "svd:rank=1"
    assert Adaptive(**settings(repair={"lr": 1e-4}).model_dump()) == settings(repair={"lr": 1e-4})


def test_models_that_do_not_fit_their_base_are_refused(base, model):
    adaptive = settings()
    with pytest.raises(RunError, match="needs clean rows"):
        train_rows(model, ROWS, SHORT, settings(clean_weight=1.0), base, pad=PAD)
    with pytest.raises(RunError, match="load the model in float32"):
        train_rows(copy.deepcopy(model).bfloat16(), ROWS, SHORT, adaptive, base, pad=PAD)
    other = build_policy()
    other.model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(RunError, match=r"'model\.extra\.weight' of the model is not in"):
        train_rows(other, ROWS, SHORT, adaptive, base, pad=PAD)
