import gc
import hashlib
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltakeeper import open_artifact, open_checkpoint, verify
from deltakeeper.apply import apply_delta, iterate_changes
from deltakeeper.attach import attached
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError, BaseMismatchError, DataError, DeltakeeperError
from deltakeeper.heal import fit, heal, run, teacher
from deltakeeper.heal.student import build_student
from deltakeeper.heal.teacher import read_batches, spool_teacher
from deltakeeper.heal.terms import TrainedTerms
from deltakeeper.layouts import Dense
from deltakeeper.testing import write_pair

ROWS = [torch.randint(3, 96, (16,), generator=torch.Generator().manual_seed(i)) for i in range(48)]
QUICK = {"steps": 40, "batch": 4, "length": 16, "lr": 5e-2}
GAINS = {
    "bitdelta:zero=plus": 0.995,  # fifteen scales, which are the best for the weights already
    "compeft": 0.999,
    "bitdelta:bits=2,scale=row": 0.9,
    "svd:rank=2": 0.95,
    "magnitude:keep=0.2": 0.9,
    "rtn:bits=2": 0.9,
}
"""What share of the difference may be left: little can be gained with few values, much with many."""
TRAINED = {f"delta_{part}" for part in ("scale", "scale.0", "scale.1", "gain", "values", "U", "V")}
"""Payload that healing may change."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def delta(models, tmp_path):
    compress(*models, tmp_path / "delta", "bitdelta:zero=plus")
    return tmp_path / "delta"


def payload(folder):
    return load_file(folder / "delta_model.safetensors")


@pytest.mark.parametrize("codec", GAINS)
def test_healing_brings_the_logits_nearer_and_the_artifact_stays_whole(models, tmp_path, codec):
    base, tuned = models
    compress(base, tuned, tmp_path / "delta", codec)
    report = heal(tmp_path / "delta", base, tuned, ROWS, tmp_path / "healed", **QUICK)
    assert report.improved
    assert report.after < GAINS[codec] * report.before
    assert verify(tmp_path / "healed", base).ok
    before, after = payload(tmp_path / "delta"), payload(tmp_path / "healed")
    changed = {key.partition("::0.")[2] for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert changed <= TRAINED


def test_the_stated_difference_is_that_of_the_served_model(models, delta, tmp_path):
    from transformers import AutoModelForCausalLM

    base, tuned = models
    report = heal(delta, base, tuned, ROWS, tmp_path / "healed", **QUICK)
    model = AutoModelForCausalLM.from_pretrained(base)
    goal = AutoModelForCausalLM.from_pretrained(tuned)
    held = read_batches(tuned, ROWS, 800, 16, 4)[:: fit.HELD_OUT]
    for folder, wanted in ((delta, report.before), (tmp_path / "healed", report.after)):
        with open_checkpoint(base) as origin, torch.no_grad():
            changes = iterate_changes(origin, open_artifact(folder))
            with attached(model, changes):
                found = [(model(ids).logits - goal(ids).logits).float().square().mean() for ids in held]
        assert float(sum(found) / len(found)) == pytest.approx(wanted, rel=0.03)


def test_uncompressed_tensors_change_too_where_that_is_asked_for(models, delta, tmp_path):
    report = heal(delta, *models, ROWS, tmp_path / "healed", trainable="scales+uncompressed", **QUICK)
    before, after = payload(delta), payload(tmp_path / "healed")
    changed = {key.partition("::")[0] for key in before if not torch.equal(before[key], after[key])}
    assert any("norm" in name for name in changed)
    assert report.improved
    assert verify(tmp_path / "healed", models[0]).ok


def test_it_is_the_same_every_time_and_another_seed_is_not(models, delta, tmp_path):
    files = []
    for i, seed in enumerate((0, 0, 1)):
        heal(delta, *models, ROWS, tmp_path / f"h{i}", seed=seed, **{**QUICK, "steps": 8})
        files.append(hashlib.sha256((tmp_path / f"h{i}" / "delta_model.safetensors").read_bytes()).hexdigest())
    assert files[0] == files[1] != files[2]


def test_values_that_make_it_worse_are_not_kept(models, delta, tmp_path):
    report = heal(delta, *models, ROWS, tmp_path / "healed", **{**QUICK, "lr": 1e4, "steps": 4})
    assert not report.improved
    assert report.after == report.before
    assert all(torch.equal(a, payload(delta)[key]) for key, a in payload(tmp_path / "healed").items())


def test_one_model_at_a_time(models, delta, tmp_path, monkeypatch):
    alive = []

    def load(folder):
        gc.collect()
        assert all(reference() is None for reference in alive), "the model before is still in memory"
        model = teacher_load(folder)
        alive.append(weakref.ref(model))
        return model

    teacher_load = teacher.load_decoder
    monkeypatch.setattr(teacher, "load_decoder", load)
    monkeypatch.setattr(run, "load_decoder", load)
    heal(delta, *models, ROWS, tmp_path / "healed", **{**QUICK, "steps": 1})
    assert len(alive) == 2


def test_gradients_are_those_of_finite_differences(models, delta):
    from transformers import AutoModelForCausalLM

    base, tuned = models
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    goal = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    student = build_student(model, open_artifact(delta), "scales")
    ids = torch.stack(ROWS[:2])
    with torch.no_grad():
        wanted = goal(ids).logits

    def loss():
        return (model(input_ids=ids, use_cache=False).logits.double() - wanted.double()).square().mean()

    loss().backward()
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        (step,) = student.trained[name].steps.values()
        with torch.no_grad():
            step += 0.05
            up = float(loss())
            step -= 0.1
            down = float(loss())
            step += 0.05
        assert float(step.grad.sum()) == pytest.approx((up - down) / 0.1, rel=0.05)


def test_the_base_takes_no_gradient_and_is_not_written_to(models, delta):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[0])
    student = build_student(model, open_artifact(delta), "scales")
    steps = {id(step) for step in student.parameters()}
    assert steps
    assert {id(p) for p in model.parameters() if p.requires_grad} == steps


def test_terms_without_continuous_values_stay_fixed():
    value = Dense((2,), "value", torch.arange(2))
    assert not TrainedTerms([value], True).steps


def test_the_spool_gives_back_the_logits(models, tmp_path):
    from transformers import AutoModelForCausalLM

    batches = read_batches(models[1], ROWS, 8, 16, 4)
    spool = spool_teacher(models[1], batches, tmp_path)
    assert spool.head is not None
    goal = AutoModelForCausalLM.from_pretrained(models[1])
    for number, ids in enumerate(batches):
        assert torch.equal(spool.logits(number), goal(ids).logits.float())


def test_logits_behind_a_head_that_does_more_are_spooled_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    _, tuned = write_pair("gemma3", tmp_path)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 3.0}))
    batches = read_batches(tuned, ROWS, 8, 16, 4)
    spool = spool_teacher(tuned, batches, tmp_path)
    goal = AutoModelForCausalLM.from_pretrained(tuned)
    assert torch.equal(spool.logits(0), goal(batches[0]).logits.float())
    assert (spool.head is None) == (goal.config.final_logit_softcapping is not None)


def test_rows_of_other_lengths_are_never_padded(models):
    batches = read_batches(models[1], [*ROWS[:5], ROWS[5][:7], ROWS[6][:1]], 99, 16, 4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 16), (1, 16), (1, 7)]


def test_conv1d_and_tied_embeddings_are_healed(tmp_path):
    for kind in ("gpt2", "llama_tied"):
        base, tuned = write_pair(kind, tmp_path / kind)
        compress(base, tuned, tmp_path / kind / "delta", "bitdelta:zero=plus")
        report = heal(tmp_path / kind / "delta", base, tuned, ROWS, tmp_path / kind / "healed", **QUICK)
        assert report.after < report.before
        apply_delta(base, tmp_path / kind / "healed", tmp_path / kind / "again")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, DataError, "steps = 0"),
        ({"lr": float("nan")}, DataError, "learning rate"),
        ({"trainable": "everything"}, DataError, "choose scales or"),
        ({"samples": 3}, DataError, "too few to hold some out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(models, delta, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        heal(delta, *models, ROWS, tmp_path / "healed", **{**QUICK, **change})
    assert not (tmp_path / "healed").exists()


def test_another_base_and_existing_folders_are_refused(models, delta, tmp_path):
    base, tuned = models
    with pytest.raises(BaseMismatchError):
        heal(delta, tuned, tuned, ROWS, tmp_path / "healed", **QUICK)
    with pytest.raises(ArtifactError, match="exists"):
        heal(delta, base, tuned, ROWS, delta, **{**QUICK, "steps": 1})


def test_artifacts_with_nothing_to_train_say_so(models, tmp_path):
    compress(*models, tmp_path / "whole", "dense")
    with pytest.raises(DeltakeeperError, match="no values to train"):
        heal(tmp_path / "whole", *models, ROWS, tmp_path / "healed", **QUICK)


def test_modules_that_are_no_linear_layers_are_refused(models, delta):
    class Odd(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[0])
    layer = model.model.layers[0].self_attn
    layer.q_proj = Odd(layer.q_proj.weight.shape)
    with pytest.raises(DeltakeeperError, match="Odd"):
        build_student(model, open_artifact(delta), "scales")
