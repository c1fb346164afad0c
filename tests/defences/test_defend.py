"""Defences on model folders: what is written is a model, tensor by tensor what the method says, in bounded memory."""

import json
import tracemalloc

import pytest
import torch
from defence_cases import ROWS, SPELLINGS, write_models
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltakeeper import compress, open_checkpoint
from deltakeeper.calibration import Calibration
from deltakeeper.defences import DEFENCES, DefenceData, Module, Modules, defend, parse_defence
from deltakeeper.defences.modules import kept
from deltakeeper.delta import pair
from deltakeeper.errors import ArtifactError, CheckpointError, DataError
from deltakeeper.testing import build_model

EACH = ("antidote", "interpolation", "norm_matched", "resta", "safe_delta", "safelora:threshold=1")
KINDS = ("llama_tied", "llama_odd", "qwen2", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = write_models(kind, folder, vocab_extra=5 if kind in ("llama_tied", "qwen2") else 0)
        return made[kind]

    return get


def run(text, models, out, **options):
    base, tuned, unaligned = models
    return defend(text, base, tuned, out, **({"unaligned": unaligned, "rows": ROWS} | options))


def tensors(folder):
    with open_checkpoint(folder) as model:
        return {name: model.read(name) for name in model.tensors}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", EACH)
def test_what_is_written_is_a_model_like_the_fine_tune(text, kind, families, tmp_path):
    models = families(kind)
    report = run(text, models, tmp_path / "out")
    found, before = tensors(tmp_path / "out"), tensors(models[1])
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert any(not torch.equal(found[n], before[n]) for n in found)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert bool(torch.isfinite(model(torch.tensor([[4, 5, 6]])).logits).all())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models[1] / "tokenizer.json").read_bytes()
    again = run(text, models, tmp_path / "again")
    assert all(torch.equal(t, found[n]) for n, t in tensors(tmp_path / "again").items())
    assert again.tensors == report.tensors
    compress(models[0], tmp_path / "out", tmp_path / "delta", "bitdelta")


def test_every_registered_defence_is_among_them():
    assert {text.partition(":")[0] for text in EACH} == set(DEFENCES)


@pytest.mark.parametrize("text", SPELLINGS)
def test_no_delta_stays_none_where_the_method_says_so(text, families, tmp_path):
    base, _, unaligned = families("llama_odd")
    report = run(text, (base, base, unaligned), tmp_path / "out")
    before = tensors(base)
    same = all(torch.equal(t, before[n]) for n, t in tensors(tmp_path / "out").items())
    assert same == parse_defence(text).keeps_zero
    json.loads(json.dumps(report.to_json(), allow_nan=False))


@pytest.mark.parametrize("kind", ["llama_odd", "gpt2", "mixtral"])
def test_every_tensor_is_what_the_method_makes_of_it(kind, families, tmp_path):
    """A second way to the same tensors: each read, oriented and joined here, whole models in memory."""
    base, tuned, unaligned = (tensors(path) for path in families(kind))
    for text in ("safelora:threshold=0.9,rest=base", "antidote:rest=base", "safe_delta:s=0.001"):
        report = run(text, families(kind), tmp_path / text.partition(":")[0])
        found = tensors(tmp_path / text.partition(":")[0])
        method = parse_defence(text)
        folder = families(kind)[0 if method.runs == "base" else 1]
        calibration = None
        if method.uses_rows:
            tokens = ROWS.rows(method.uses_rows, AutoTokenizer.from_pretrained(folder))
            calibration = Calibration(folder, tokens)
        treated = 0
        for name, tensor in found.items():
            if report.tensors[name].fate not in ("defended", "unchanged"):
                assert torch.equal(tensor, base[name])
                continue
            turn = (lambda t: t.T.contiguous()) if kind == "gpt2" and "c_" in name else (lambda t: t)
            sides = [turn(side[name].float()) for side in (base, tuned, unaligned)]
            inputs = None if calibration is None else calibration.inputs(name)
            if tensor.ndim == 2:
                assert "wpe" in name or not method.uses_rows or inputs is not None or kind == "mixtral"
                made = method.defend(Module(name, "linear", *sides, inputs)).weight
                expected = sides[1] if made is None else made
            else:
                parts = [
                    method.defend(Module(f"{name}[{i}]", "linear", *(s[i] for s in sides))) for i in range(len(tensor))
                ]
                expected = torch.stack(
                    [s if p.weight is None else p.weight for s, p in zip(sides[1], parts, strict=True)]
                )
            assert torch.equal(tensor, turn(expected).to(tensor.dtype)), name
            treated += 1
        assert treated >= 8


def test_tied_heads_and_grown_vocabularies(families, tmp_path):
    models = families("llama_tied")
    report = run("interpolation:factor=0", models, tmp_path / "out")
    base, tuned, found = tensors(models[0]), tensors(models[1]), tensors(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name][:96], base[name])
    assert torch.equal(found[name][96:], tuned[name][96:])
    assert len(found[name]) == 101
    assert report.total.norm_ratio == 0
    run("resta:scale=1", models, tmp_path / "resta")
    assert torch.equal(tensors(tmp_path / "resta")[name][96:], tuned[name][96:])


def test_an_alias_is_written_with_its_tensor(families, tmp_path):
    base, tuned, _ = families("llama_tied")
    for source, name in ((base, "base"), (tuned, "tuned")):
        (tmp_path / name).mkdir()
        for file in source.glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        held = load_file(source / "model.safetensors")
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
        save_file(held, tmp_path / name / "model.safetensors", {"format": "pt"})
    report = defend("interpolation", tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert report.tensors["lm_head.weight"].fate == "tied"
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tensors(tuned)["model.embed_tokens.weight"])


def test_rest_decides_on_what_a_method_does_not_treat(families, tmp_path):
    models = families("qwen2")
    base, tuned = tensors(models[0]), tensors(models[1])
    for rest, side in (("base", base), ("tuned", tuned)):
        run(f"antidote:rest={rest}", models, tmp_path / rest)
        found = tensors(tmp_path / rest)
        for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.bias"):
            assert torch.equal(found[name], side[name])
            assert not torch.equal(base[name], tuned[name])
        assert torch.equal(found["lm_head.weight"][:96], side["lm_head.weight"][:96])
        assert torch.equal(found["lm_head.weight"][96:], tuned["lm_head.weight"][96:])


@pytest.mark.parametrize("lowest", [1, 3, 5, 100])
def test_safelora_projects_the_lowest_cosines(lowest, families, tmp_path):
    models = families("llama_odd")
    every = run("safelora:threshold=1", models, tmp_path / "every").tensors
    cosines = {name: t.detail["cosine"] for name, t in every.items() if "cosine" in t.detail}
    report = run(f"safelora:lowest={lowest}", models, tmp_path / "lowest")
    projected = {name for name, t in report.tensors.items() if t.detail.get("projected")}
    assert projected == set(sorted(cosines, key=cosines.__getitem__)[:lowest])
    assert report.defence == f"safelora:lowest={lowest}"


def test_safelora_pairs_by_name_whatever_the_order(families, tmp_path):
    """Upstream pairs by iteration order, so another order in the file would give another model."""
    base, tuned, unaligned = families("llama_odd")
    run("safelora:threshold=1", (base, tuned, unaligned), tmp_path / "one")
    other = tmp_path / "unaligned"
    other.mkdir()
    (other / "config.json").write_bytes((unaligned / "config.json").read_bytes())
    held = load_file(unaligned / "model.safetensors")
    names = sorted(held, reverse=True)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: held[n] for n in part}, other / f"model-{i}.safetensors", {"format": "pt"})
    run("safelora:threshold=1", (base, tuned, other), tmp_path / "two")
    first = tensors(tmp_path / "one")
    assert all(torch.equal(t, first[n]) for n, t in tensors(tmp_path / "two").items())


def test_norms_match_those_of_an_artifact(families, tmp_path):
    """Tensor by tensor, against what `compress` reports of the same codec."""
    base, tuned, _ = families("llama_odd")
    for codec in ("bitdelta", "ultradelta:p=0.5"):
        folder = tmp_path / codec.partition(":")[0]
        packed = compress(base, tuned, folder / "delta", codec)
        report = defend(f"norm_matched:{codec}", base, tuned, folder / "out")
        checked = 0
        for name, found in report.tensors.items():
            if found.fate == "defended":
                assert found.detail["factor"] == pytest.approx(packed.tensors[name].fidelity.norm_ratio, rel=1e-4)
                checked += 1
        assert checked > 10


def test_a_lora_adapter_is_a_fine_tune(families, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _, unaligned = families("llama_odd")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    before = tensors(base)
    for text in ("safelora:threshold=1", "antidote"):
        report = run(text, (base, tmp_path / "adapter", unaligned), tmp_path / text.partition(":")[0])
        found = tensors(tmp_path / text.partition(":")[0])
        changed = {name for name in found if not torch.equal(found[name], before[name])}
        assert changed == {n for n in found if "q_proj" in n or "v_proj" in n}
        assert report.counts()["defended"] >= len(changed)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / text.partition(":")[0]) is not None


@pytest.mark.parametrize("broken", ["base", "tuned", "unaligned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_by_name_and_nothing_is_left(broken, value, families, tmp_path):
    models = dict(zip(("base", "tuned", "unaligned"), families("llama_odd"), strict=True))
    held = load_file(models[broken] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    held[name][3, 4] = value
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_bytes((models[broken] / "config.json").read_bytes())
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}'.*broken holds NaN or infinity"):
        run("resta", (models | {broken: folder}).values(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_norm_that_nobody_treats_is_looked_at_too(families, tmp_path):
    base, tuned, unaligned = families("llama_odd")
    held = load_file(tuned / "model.safetensors")
    held["model.norm.weight"][0] = float("nan")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_bytes((tuned / "config.json").read_bytes())
    save_file(held, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight'"):
        run("safelora", (base, tmp_path / "tuned", unaligned), tmp_path / "out")


def test_what_the_dtype_cannot_hold_is_refused(tmp_path):
    base, tuned, unaligned = write_models("llama_odd", tmp_path, dtype=torch.float16)
    held = load_file(unaligned / "model.safetensors")
    held["model.norm.weight"][0] = -60000.0
    save_file(held, unaligned / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"'resta:scale=16' gives 'model\.norm\.weight' values that F16 cannot hold"):
        defend("resta:scale=16", base, tuned, tmp_path / "out", unaligned=unaligned)


def test_what_is_missing_is_named(families, tmp_path):
    base, tuned, _ = families("llama_odd")
    with pytest.raises(DataError, match=r"'safelora' compares .* --unaligned"):
        defend("safelora", base, tuned, tmp_path / "out")
    with pytest.raises(DataError, match=r"'antidote' runs a model on harmful rows; give .* --harmful"):
        defend("antidote", base, tuned, tmp_path / "out", rows=DefenceData(safe=("w1",)))
    with pytest.raises(DataError, match=r"'safe_delta' runs a model on safe rows; give .* --safe"):
        defend("safe_delta", base, tuned, tmp_path / "out", rows=DefenceData(harmful=("w1",)))
    with pytest.raises(CheckpointError, match="give the base of this fine-tune"):
        build_model("gpt2").save_pretrained(tmp_path / "gpt2")
        defend("resta", base, tuned, tmp_path / "out", unaligned=tmp_path / "gpt2")
    assert not (tmp_path / "out").exists()


def test_folders_are_replaced_only_when_asked(families, tmp_path):
    models = families("llama_odd")
    run("interpolation", models, tmp_path / "out")
    with pytest.raises(ArtifactError, match="--overwrite"):
        run("interpolation:factor=0.1", models, tmp_path / "out")
    report = run("interpolation:factor=0.25", models, tmp_path / "out", overwrite=True)
    assert report.total.norm_ratio == pytest.approx(0.25, rel=0.1)
    stored = json.loads((tmp_path / "out" / "defence.json").read_text())
    assert stored["defence"] == "interpolation:factor=0.25"
    assert stored["total"]["cosine"] == report.total.cosine
    assert (stored["rows"], stored["tuned"], "unaligned" in stored) == (None, str(models[1]), False)
    with pytest.raises(ArtifactError, match="holds what the model is made from"):
        run("interpolation", models, models[2], overwrite=True)


def test_one_tensor_at_a_time(tmp_path):
    """Python's own allocations hold what is read from disk: a few tensors, whatever the number of layers."""
    folder = tmp_path / "models"
    folder.mkdir()
    base, tuned, unaligned = write_models("llama_odd", folder, dtype=torch.float32)
    total = sum(t.nbytes for t in load_file(tuned / "model.safetensors").values())
    for text in ("safelora:lowest=3", "resta", "interpolation"):
        defend(text, base, tuned, tmp_path / "warm", unaligned=unaligned, overwrite=True)
        tracemalloc.start()
        defend(text, base, tuned, tmp_path / "out", unaligned=unaligned, overwrite=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < total, text


@given(st.integers(0, 2**31), st.sampled_from(["interpolation:factor=0.3", "safelora:threshold=1", "resta:drop=0.5"]))
@settings(max_examples=6, deadline=None)
def test_parts_are_joined_to_what_they_were(families, seed, text):
    """Taken apart and joined, a tensor is the fine-tune's again, experts, Conv1D and added rows among them."""
    kind = KINDS[seed % len(KINDS)]
    with open_checkpoint(families(kind)[0]) as base, open_checkpoint(families(kind)[1]) as tuned:
        modules = Modules(parse_defence(text), pair(base, tuned))
        name = modules.names[seed % len(modules.names)]
        joined = modules.join(name, [part.tuned for part in modules.parts(name)])
        assert torch.equal(joined, tuned.read(name))
        value, is_base = kept(modules.models, name, "base")
        assert is_base
        assert value.shape == joined.shape
