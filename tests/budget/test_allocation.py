"""Allocations on small pairs: they land on their budget, as written, and give bytes to the tensors that need them."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import save_file

from deltakeeper.artifact import open_artifact
from deltakeeper.budget import allocate, parts, target_bytes
from deltakeeper.budget import allocation as allocation_module
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.codecs import BitDelta, Inputs, Svd, parse_codec, spell
from deltakeeper.codecs.auto import Auto
from deltakeeper.compress import compress
from deltakeeper.delta import pair
from deltakeeper.errors import CodecError
from deltakeeper.plan import Choice, Rules, choose_codec
from deltakeeper.testing import write_pair


def save(folder, tensors):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def make(folder, deltas, dtype=torch.bfloat16):
    """A pair with these differences, added to Gaussian weights; float32 weights of 0 keep a difference exactly."""
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(d.shape, generator=generator).to(dtype) * 0.02 for n, d in deltas.items()}
    if dtype == torch.float32:
        base = {n: torch.zeros_like(w) for n, w in base.items()}
    tuned = {n: (w.float() + deltas[n]).to(dtype) for n, w in base.items()}
    return opened(save(folder / "base", base), save(folder / "tuned", tuned))


OPENED = ExitStack()


@pytest.fixture(autouse=True)
def _close_checkpoints():
    with OPENED:
        yield


def opened(base, tuned):
    return pair(*(OPENED.enter_context(open_checkpoint(folder)) for folder in (base, tuned)))


def gaussian(*shape, std=1e-3, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def uniform_pair(folder, dtype=torch.bfloat16):
    """Eight matrices of two shapes, with deltas of rising size and falling rank."""
    deltas = {}
    for i in range(8):
        shape = (128, 256) if i % 2 else (256, 96)
        low = gaussian(shape[0], 4, seed=i) @ gaussian(4, shape[1], std=1, seed=50 + i)
        deltas[f"layers.{i}.weight"] = (gaussian(*shape, seed=90 + i) + i % 3 * low) * (1 + i)
    deltas["norm.weight"] = gaussian(96)
    return make(folder, deltas, dtype)


def write(models, codec, target, out):
    """The artifact that compressing gives under the same budget."""
    compress(models.base, models.tuned, out, codec, target_size=target)
    return open_artifact(out)


@pytest.mark.parametrize("codec", ["bitdelta", "svd:rank=4", "magnitude", "bitdelta+svd:rank=4", "compeft", "auto"])
@pytest.mark.parametrize("share", [5, 13])
def test_the_written_artifact_is_within_one_percent_under_the_budget(tmp_path, codec, share):
    models = uniform_pair(tmp_path, torch.float32)
    target = sum(info.nbytes for info in models.tuned.tensors.values()) // share
    allocation = allocate(models, Rules(choose_codec(codec, budgeted=True)), target)
    artifact = write(models, codec, target, tmp_path / "delta")
    assert 0.99 * target <= artifact.nbytes <= allocation.total_bytes <= target
    for name, plan in allocation.predicted.items():
        assert artifact.record(name).stored_bytes == plan.bytes, name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma3"])
@pytest.mark.parametrize("codec", ["bitdelta", "svd:rank=4"])
def test_every_architecture_lands_on_its_budget(tmp_path, kind, codec):
    models = opened(*write_pair(kind, tmp_path, dtype=torch.float32, vocab_extra=4 if kind == "gemma3" else 0))
    target = target_bytes(models, ratio="2.5")
    allocation = allocate(models, Rules(parse_codec(codec)), target)
    artifact = write(models, codec, target, tmp_path / "delta")
    assert 0.985 * target <= artifact.nbytes <= allocation.total_bytes <= target  # half of it is manifest and report
    assert allocation.total_bytes >= 0.99 * target


def test_predicted_errors_are_those_of_the_written_artifact(tmp_path):
    models = uniform_pair(tmp_path)
    allocation = allocate(models, Rules(Auto()), 140_000)
    artifact = write(models, "auto", 140_000, tmp_path / "delta")
    assert {choice.treatment for choice in allocation.choices.values()} >= {"terms"}
    for name, plan in allocation.predicted.items():
        record = artifact.record(name)
        if record.encoding != "terms" or artifact.terms(name)[0].replaces:
            continue
        true = models.tensor(name).matrix()
        left = true - sum(term.to_dense() for term in artifact.terms(name))
        assert plan.error == pytest.approx(float(left.double().square().sum()), rel=1e-3, abs=1e-9)
        assert plan.energy == pytest.approx(float(true.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("codec", ["bitdelta", "svd:rank=1", "magnitude"])
def test_more_bytes_never_give_more_error(tmp_path, codec):
    models = uniform_pair(tmp_path)
    rules = Rules(Auto() if codec == "auto" else parse_codec(codec))
    errors = [allocate(models, rules, target).error for target in range(20_000, 300_000, 43_456)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_a_large_delta_gets_more_bits_than_a_small_one_of_the_same_shape(tmp_path):
    models = make(tmp_path, {"large": gaussian(256, 256, std=1e-2), "small": gaussian(256, 256, std=1e-3, seed=1)})
    allocation = allocate(models, Rules(BitDelta()), 45_000)
    assert allocation.codecs["large"].bits > allocation.predicted["small"].bytes * 8 / 65536
    assert allocation.predicted["large"].bytes > allocation.predicted["small"].bytes


def test_a_delta_of_low_rank_gets_a_low_rank_term_and_noise_gets_signs(tmp_path):
    low = gaussian(256, 4) @ gaussian(4, 256, std=1, seed=1)
    models = make(tmp_path, {"low": low, "noise": gaussian(256, 256, seed=2)}, torch.float32)
    codecs = allocate(models, Rules(Auto()), 24_000).codecs
    assert isinstance(codecs["low"], Svd) and spell(codecs["noise"]).startswith("bitdelta")


def test_inputs_move_bytes_to_the_tensor_whose_layer_is_fed_more(tmp_path):
    models = make(tmp_path, {"a": gaussian(256, 256), "b": gaussian(256, 256, seed=1)})
    plain = allocate(models, Rules(BitDelta()), 45_000)
    loud = Inputs(100 * torch.eye(256), torch.zeros(256), 1000)
    quiet = Inputs(torch.eye(256), torch.zeros(256), 1000)
    for name, other in (("a", "b"), ("b", "a")):
        found = allocate(models, Rules(BitDelta()), 45_000, inputs={name: loud, other: quiet}.get)
        assert found.predicted[name].bytes > found.predicted[other].bytes
        assert found.predicted[name].bytes > plain.predicted[name].bytes
        assert found.predicted[name].energy == pytest.approx(100 * plain.predicted[name].energy, rel=1e-4)


def test_inputs_choose_among_ranks_by_what_the_layer_sees(tmp_path):
    """A direction that no input has costs nothing to lose, however large the delta is along it."""
    delta = torch.zeros(256, 256)
    delta[:, 0] = gaussian(256, std=1e-1)  # large, but input 0 is always zero
    delta[:, 1] = gaussian(256, std=1e-2, seed=1)
    gram = torch.eye(256)
    gram[0, 0] = 0.0
    models = make(tmp_path, {"w": delta, "v": gaussian(64, 64, std=1e-2, seed=2)}, torch.float32)
    sees = Inputs(gram, torch.zeros(256), 10).gram
    allocation = allocate(
        models, Rules(Svd(rank=1)), 10_000, inputs=lambda n: Inputs(sees, torch.zeros(256), 10) if n == "w" else None
    )
    weighted = float((delta @ gram * delta).sum())
    assert allocation.predicted["w"].energy == pytest.approx(weighted, rel=1e-4)


def test_embeddings_without_inputs_count_by_their_mean_row(tmp_path):
    deltas = {"model.embed_tokens.weight": gaussian(512, 64), "q.weight": gaussian(64, 64, seed=1)}
    models = make(tmp_path, deltas)
    inputs = {"q.weight": Inputs(torch.eye(64), torch.zeros(64), 10)}
    plain = allocate(models, Rules(BitDelta()), 20_000).predicted["model.embed_tokens.weight"]
    fed = allocate(models, Rules(BitDelta()), 20_000, inputs=inputs.get).predicted["model.embed_tokens.weight"]
    assert fed.energy == pytest.approx(plain.energy / 512)
    assert fed.bytes < plain.bytes


def test_fine_steps_count_errors_like_the_others(tmp_path, monkeypatch):
    """Candidates that come late, to fill what is left over, must not look better or worse than the first ones."""
    monkeypatch.setattr(allocation_module, "SMALL", 0)  # so that fine steps are added afterwards
    models = make(tmp_path, {"model.embed_tokens.weight": gaussian(512, 64), "q.weight": gaussian(64, 64, seed=1)})
    inputs = {"q.weight": Inputs(torch.eye(64), torch.zeros(64), 10)}
    for target in range(9_000, 20_000, 2_500):
        found = allocate(models, Rules(BitDelta()), target, inputs=inputs.get)
        codec = found.codecs.get("model.embed_tokens.weight")
        if codec is not None:
            true = models.tensor("model.embed_tokens.weight").matrix()
            left = true - sum(term.to_dense() for term in codec.encode(true, name="model.embed_tokens.weight"))
            error = found.predicted["model.embed_tokens.weight"].error
            assert error == pytest.approx(float(left.square().sum()) / 512, rel=1e-2)


def test_rules_of_embeddings_and_norms_hold_under_a_budget(tmp_path):
    deltas = {
        "model.embed_tokens.weight": gaussian(512, 64),
        "lm_head.weight": gaussian(512, 64, seed=3),
        "q.weight": gaussian(256, 128, seed=1),
        "norm.weight": gaussian(64, seed=2),
    }
    models = make(tmp_path, deltas)
    allocation = allocate(models, Rules(BitDelta(), embeddings="base", norms="base"), 16_000)
    assert allocation.choices["lm_head.weight"] == allocation.choices["norm.weight"] == Choice("base")
    assert set(allocation.codecs) == {"q.weight"}
    allocation = allocate(models, Rules(BitDelta(), embeddings="svd:rank=1"), 40_000)
    assert allocation.choices["norm.weight"] == Choice("value")
    own = {type(allocation.choices[n].codec) for n in ("lm_head.weight", "model.embed_tokens.weight")}
    assert own <= {Svd, type(None)} and Svd in own


def test_the_smallest_artifact_is_named_when_the_budget_is_smaller(tmp_path):
    models = uniform_pair(tmp_path)
    with pytest.raises(CodecError, match=r"smallest artifact of this pair takes \d+ bytes") as caught:
        allocate(models, Rules(BitDelta()), 1000)
    least = int(str(caught.value).split(" bytes; ")[0].rsplit(" ", 1)[1])
    assert allocate(models, Rules(BitDelta()), least + 200).total_bytes <= least + 200


def test_a_budget_of_more_than_the_fine_tune_keeps_everything(tmp_path):
    models = uniform_pair(tmp_path)
    assert allocate(models, Rules(BitDelta()), 10**9).error == 0.0


def test_a_delta_that_is_not_finite_is_named(tmp_path):
    broken = gaussian(64, 64)
    broken[3, 5] = math.inf
    models = make(tmp_path, {"w": broken, "v": gaussian(64, 64)})
    with pytest.raises(CodecError, match="'w' holds NaN or infinity"):
        allocate(models, Rules(BitDelta()), 20_000)


def test_a_control_has_nothing_to_choose(tmp_path):
    with pytest.raises(CodecError, match="no setting that a budget could turn"):
        allocate(uniform_pair(tmp_path), Rules(parse_codec("shrink:factor=0.5")), 100_000)


def test_a_size_and_a_ratio_are_one_too_many(tmp_path):
    models = make(tmp_path, {"w": gaussian(64, 64)})
    assert target_bytes(models, ratio="4") == 2048 and target_bytes(models, size="1kB") == 1000
    assert target_bytes(models) is None
    with pytest.raises(CodecError, match="give one of them"):
        target_bytes(models, size="1kB", ratio="4")


@pytest.mark.parametrize("codec", ["bitdelta:bits=1", "bitdelta:bits=4,scale=row", "magnitude:keep=0.1"])
def test_the_sample_tells_the_error_within_one_percent(tmp_path, monkeypatch, codec):
    """Rows of very different size, as attention heads have: an eighth of them stands for all."""
    spread = 1e-3 * torch.exp(0.3 * gaussian(2048, 1, std=1, seed=1))
    models = make(tmp_path, {"w": gaussian(2048, 128, std=1) * spread}, torch.float32)
    delta = models.tensor("w")
    whole, method = delta.matrix(), parse_codec(codec)
    true = sum(((whole - t.to_dense()) ** 2).sum().item() for t in method.encode(whole, name="w"))
    monkeypatch.setattr(parts, "SAMPLE", whole.numel() // 8)
    (part,) = parts.parts_of(delta, None)
    assert not part.whole and len(part.rows) == 256
    left = part.rows - sum(term.to_dense() for term in method.encode(part.rows, name="w"))
    assert part.error(left) == pytest.approx(true, rel=0.01 if "magnitude" in codec else 0.02)
    assert part.energy == pytest.approx(float(whole.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("codec", ["bitdelta", "magnitude", "compeft"])
def test_sizes_are_right_though_errors_were_sampled(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(parts, "SAMPLE", 1 << 12)
    models = uniform_pair(tmp_path)
    artifact = write(models, codec, 90_000, tmp_path / "delta")
    assert 0.99 * 90_000 <= artifact.nbytes <= 90_000


def test_tensors_that_weigh_more_get_more_bytes(tmp_path):
    models = make(tmp_path, {f"layers.{i}.weight": gaussian(64, 96, seed=i) for i in range(4)})
    rules = Rules(choose_codec("bitdelta", budgeted=True), "codec", "dense")
    full = sum(info.nbytes for info in models.tuned.tensors.values())
    even = allocate(models, rules, full // 4)
    heavy = allocate(models, rules, full // 4, weights={"layers.2.weight": 1.0, "layers.0.weight": 0.01})
    bytes_of = [heavy.predicted[f"layers.{i}.weight"].bytes for i in (0, 1, 2)]
    assert bytes_of[0] < bytes_of[2] and bytes_of[0] < even.predicted["layers.0.weight"].bytes
    assert heavy.total_bytes <= full // 4
    one = allocate(models, rules, full // 4, weights=dict.fromkeys(models.names(), 1.0))
    assert one == even
    with pytest.raises(CodecError, match=r"'layers.0.weight' cannot be weighed by 0"):
        allocate(models, rules, full // 4, weights={"layers.0.weight": 0.0})
