"""Healing of models that are not plain: biases, tied and untied heads, adapters, other settings, stored values."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from deltakeeper.apply import apply_delta
from deltakeeper.compress import compress
from deltakeeper.errors import CheckpointError, DataError, DeltakeeperError
from deltakeeper.heal import fit, heal, run, teacher
from deltakeeper.heal.losses import LOSSES
from deltakeeper.heal.student import check_forms, checksums
from deltakeeper.heal.teacher import read_batches
from deltakeeper.manifest import TensorRecord, TermRecord
from deltakeeper.testing import write_pair

ROWS = [torch.randint(3, 96, (16,), generator=torch.Generator().manual_seed(i)) for i in range(48)]
QUICK = {"steps": 24, "batch": 4, "length": 16}
CODEC = "bitdelta:zero=plus"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def served(base, delta, goal, out):
    """The difference on held-out rows of the checkpoint that the artifact becomes."""
    apply_delta(base, delta, out)
    model = load(out)
    held = read_batches(out, ROWS, 800, 16, 4)[:: fit.HELD_OUT]
    with torch.no_grad():
        found = [(model(ids).logits - goal(ids).logits).square().mean() for ids in held]
    return float(sum(found) / len(found))


def check_served(report, folder, base, goal):
    for name, stated in (("delta", report.before), ("healed", report.after)):
        assert served(base, folder / name, goal, folder / f"{name}-applied") == pytest.approx(stated, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "trainable", "embeddings"),
    [
        ("qwen2", "scales+uncompressed", "codec"),
        ("gpt2", "scales+uncompressed", "codec"),
        ("llama_tied", "scales+uncompressed", "dense"),
        ("llama_tied", "scales", "dense"),
    ],
)
def test_what_is_healed_is_what_is_served(tmp_path, kind, trainable, embeddings):
    base, tuned = write_pair(kind, tmp_path, dtype=torch.float32)
    compress(base, tuned, tmp_path / "delta", "bitdelta:bits=2,scale=row", embeddings=embeddings)
    report = heal(tmp_path / "delta", base, tuned, ROWS, tmp_path / "healed", trainable=trainable, **QUICK)
    assert report.improved
    check_served(report, tmp_path, base, load(tuned))


def test_the_student_has_the_settings_of_the_fine_tune(tmp_path):
    base, tuned = write_pair("llama", tmp_path, dtype=torch.float32)
    settings = json.loads((tuned / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10.0}
    (tuned / "config.json").write_text(json.dumps(settings))
    compress(base, tuned, tmp_path / "delta", CODEC)
    report = heal(tmp_path / "delta", base, tuned, ROWS, tmp_path / "healed", **QUICK)
    check_served(report, tmp_path, base, load(tuned))


def test_an_adapter_teaches_on_the_base_that_was_given(tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = write_pair("llama", tmp_path, dtype=torch.float32)
    settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(load(base), settings)
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    compress(base, tmp_path / "adapter", tmp_path / "delta", CODEC)
    report = heal(tmp_path / "delta", base, tmp_path / "adapter", ROWS, tmp_path / "healed", **QUICK)
    assert report.improved
    check_served(report, tmp_path, base, model.merge_and_unload().eval())


def test_a_head_tied_by_the_fine_tune_alone_is_refused(tmp_path):
    base, _ = write_pair("llama", tmp_path)
    _, tuned = write_pair("llama_tied", tmp_path / "tied")
    compress(base, tuned, tmp_path / "delta", CODEC)
    with pytest.raises(DeltakeeperError, match=r"'lm_head.weight' that the artifact does not have, or ties"):
        heal(tmp_path / "delta", base, tuned, ROWS, tmp_path / "healed", **QUICK)


def test_a_head_untied_by_the_fine_tune_is_refused(tmp_path):
    base, _ = write_pair("llama_tied", tmp_path)
    _, tuned = write_pair("llama", tmp_path / "untied")
    compress(base, tuned, tmp_path / "delta", CODEC)
    with pytest.raises(DeltakeeperError, match="tie their head as their base does"):
        heal(tmp_path / "delta", base, tuned, ROWS, tmp_path / "healed", **QUICK)


def test_a_head_untied_but_unchanged_is_refused_too():
    record = TensorRecord((8, 4), "F32", "head", "unchanged", "embed", (8, 4))
    with pytest.raises(DeltakeeperError, match="both come from the base's 'embed'"):
        check_forms(SimpleNamespace(names=["embed", "head"], record=lambda _: record))


def test_stacks_of_experts_are_refused():
    terms = tuple(TermRecord("dense", {"encoding": "delta", "dtype": "float32"}, i) for i in range(2))
    record = TensorRecord((2, 3, 4), "F32", "linear", "terms", "experts", (2, 3, 4), terms=terms)
    with pytest.raises(DeltakeeperError, match="stack of experts"):
        check_forms(SimpleNamespace(names=["experts"], record=lambda _: record))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def delta(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "delta"
    compress(*models, folder, "svd:rank=2,factors=bfloat16")
    return folder


def test_steps_that_rounding_swallows_are_no_improvement(models, delta, tmp_path):
    report = heal(delta, *models, ROWS, tmp_path / "healed", lr=1e-7, **QUICK)
    assert not report.improved
    assert report.after == report.before
    files = [(folder / "delta_model.safetensors").read_bytes() for folder in (delta, tmp_path / "healed")]
    assert files[0] == files[1]


def test_another_fine_tune_is_refused_unless_none_was_known(models, delta, tmp_path):
    _, other = write_pair("llama", tmp_path, scale=2e-3)
    with pytest.raises(CheckpointError, match="is not the fine-tune that"):
        heal(delta, models[0], other, ROWS, tmp_path / "healed", **QUICK)
    shutil.copytree(delta, tmp_path / "imported")
    config = tmp_path / "imported" / "delta_config.json"
    manifest = json.loads(config.read_text())
    manifest["target"]["root"] = manifest["reconstruction"]["root"]
    config.write_text(json.dumps(manifest))
    few = {**QUICK, "steps": 2}
    assert heal(tmp_path / "imported", models[0], other, ROWS, tmp_path / "healed", **few).steps == 2


def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(models, delta, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "load_decoder", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(DeltakeeperError, match="exists"):
        heal(delta, *models, ROWS, tmp_path / "taken", **QUICK)


def test_too_little_room_for_what_the_fine_tune_says(models, delta, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
    with pytest.raises(DataError, match="set TMPDIR"):
        heal(delta, *models, ROWS, tmp_path / "healed", **QUICK)
    assert not (tmp_path / "healed").exists()


def test_a_frozen_weight_that_changes_is_noticed(models, delta, tmp_path, monkeypatch):
    def write(self, *_):
        weight = self._student.model.get_parameter("model.norm.weight")
        weight.data[0] += 1  # which autograd does not see
        return {}

    monkeypatch.setattr(run.Fit, "train", write)
    with pytest.raises(DeltakeeperError, match="frozen weight"):
        heal(delta, *models, ROWS, tmp_path / "healed", **QUICK)
    assert not (tmp_path / "healed").exists()


def test_checksums_leave_out_what_is_trained():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(checksums(model)) == ["bias"]


def test_the_loss_can_be_another(models, delta, tmp_path, monkeypatch):
    seen = []

    def absolute(student, goal):
        seen.append(student.shape)
        return (student - goal).abs().mean()

    monkeypatch.setitem(LOSSES, "absolute", absolute)
    own = heal(delta, *models, ROWS, tmp_path / "own", loss="absolute", **{**QUICK, "steps": 2})
    plain = heal(delta, *models, ROWS, tmp_path / "plain", **{**QUICK, "steps": 2})
    assert seen[0] == (4, 16, 96)
    assert own.before > 10 * plain.before
    with pytest.raises(DataError, match="knows no loss 'other'"):
        heal(delta, *models, ROWS, tmp_path / "other", loss="other", **QUICK)


def test_tokens_and_documents_do_not_mix(models):
    with pytest.raises(DataError, match="partly tokens"):
        read_batches(models[1], [ROWS[0], "a text"], 8, 16, 4)
    with pytest.raises(DataError, match="0 rows"):
        read_batches(models[1], [], 8, 16, 4)
