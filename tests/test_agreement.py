"""Agreement on a text, against brute force over whole distributions, and the tensors that verify lists."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper import agreement, cli
from deltakeeper.agreement import measure_agreement, read_windows
from deltakeeper.apply import apply_delta
from deltakeeper.compress import compress
from deltakeeper.errors import CheckpointError, DataError
from deltakeeper.testing import write_pair, write_tokenizer
from deltakeeper.verify import verify

WORDS = 90


def write_text(folder, words=150, modulus=WORDS):
    (folder / "text.txt").write_text(" ".join(f"w{(7 * i * i + i) % modulus}" for i in range(words)))
    return folder / "text.txt"


def made(folder, kind="llama", codec="bitdelta", extra=0, **settings):
    base, tuned = write_pair(kind, folder, scale=0.05, vocab_extra=extra, **settings)
    write_tokenizer(tuned, WORDS + extra)
    compress(base, tuned, folder / "delta", codec)
    return base, tuned, folder / "delta"


def logits_of(folder, windows):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.cat([model(part[None]).logits[0] for part in windows]).double()


def brute(true, other):
    """KL and top-1 agreement, position by position and token by token."""
    divergences, same = [], 0
    for a, b in zip(true, other, strict=True):
        shared = min(len(a), len(b))
        p, q = a[:shared].exp() / a[:shared].exp().sum(), b[:shared].exp() / b[:shared].exp().sum()
        divergences.append(sum(float(x) * (float(x.log()) - float(y.log())) for x, y in zip(p, q, strict=True)))
        same += int(a.argmax()) == int(b.argmax())
    return sum(divergences) / len(divergences), max(divergences), same / len(divergences)


@pytest.mark.parametrize(("kind", "extra"), [("llama", 0), ("gpt2", 0), ("llama", 4)])
def test_divergence_and_top_token_are_those_of_brute_force(tmp_path, monkeypatch, kind, extra):
    monkeypatch.setattr(agreement, "BLOCK", 500)  # a few rows a block
    base, tuned, delta = made(tmp_path, kind, extra=extra)
    text = write_text(tmp_path)
    calls = []
    report = verify(delta, base, tuned, lambda *call: calls.append(call), text=text, tokens=100)
    windows = read_windows(text, [tuned], 100)
    assert [len(part) for part in windows] == [64, 36]  # the model sees 64 tokens
    apply_delta(base, delta, tmp_path / "again")
    true = logits_of(tuned, windows)
    for name, folder in (("decoded", tmp_path / "again"), ("base", base)):
        kl, worst, top1 = brute(true, logits_of(folder, windows))
        found = report.text[name]
        assert (found.kl, found.kl_worst) == (pytest.approx(kl, rel=1e-4), pytest.approx(worst, rel=1e-4))
        assert found.top1 == top1 and found.tokens == 100
    assert report.text["decoded"].kl < report.text["base"].kl
    assert [call[2] for call in calls[-3:]] == [
        "the fine-tune on the text",
        "the decoded model on the text",
        "the base on the text",
    ]
    assert json.loads(json.dumps(report.to_json()))["text"]["decoded"]["tokens"] == 100


def test_a_whole_delta_agrees_in_everything(tmp_path):
    base, tuned, delta = made(tmp_path, codec="dense")
    for precision in ("float32", "stored"):
        report = verify(delta, base, tuned, text=write_text(tmp_path), precision=precision)
        assert report.text["decoded"].kl == report.text["decoded"].kl_worst == 0
        assert report.text["decoded"].top1 == 1 and report.text["base"].kl > 0
    assert report.worst == []


def test_a_base_that_lacks_tokens_of_the_text_is_no_reference(tmp_path):
    base, tuned, delta = made(tmp_path, extra=6)
    report = verify(delta, base, tuned, text=write_text(tmp_path, modulus=WORDS + 6))
    assert report.text["base"] is None and report.text["decoded"].kl > 0


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_is_a_fine_tune_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    from deltakeeper.testing import build_model

    model = build_model("llama")
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    settings = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    adapted = get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    compress(tmp_path / "base", tmp_path / "adapter", tmp_path / "delta", "bitdelta")
    text = write_text(tmp_path)
    report = verify(tmp_path / "delta", tmp_path / "base", tmp_path / "adapter", text=text, tokens=64)
    windows = read_windows(text, [tmp_path / "base"], 64)
    with torch.inference_mode():
        true = torch.cat([adapted(part[None]).logits[0] for part in windows]).double()
    kl, _, top1 = brute(true, logits_of(tmp_path / "base", windows))
    assert report.text["base"].kl == pytest.approx(kl, rel=1e-3) and report.text["base"].top1 == top1


def test_one_model_is_in_memory_at_a_time_and_nothing_stays_on_disk(tmp_path, monkeypatch):
    import weakref

    from transformers import AutoModelForCausalLM

    base, tuned, delta = made(tmp_path)
    alive, most, load = [], [0], AutoModelForCausalLM.from_pretrained

    def counted(*arguments, **settings):
        model = load(*arguments, **settings)
        alive.append(weakref.ref(model))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    verify(delta, base, tuned, text=write_text(tmp_path))
    assert (len(alive), most[0]) == (3, 1)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_worst_tensors_come_first_and_rows_that_were_added_do_not_count(tmp_path):
    base, tuned, delta = made(tmp_path, extra=3)
    report = verify(delta, base, tuned)
    errors = [found.relative_error for _, found in report.worst]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    before, after = (load_file(path / "model.safetensors")["lm_head.weight"].float() for path in (base, tuned))
    apply_delta(base, delta, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")["lm_head.weight"].float()
    rows = len(before)
    error = (again[:rows] - after[:rows]).norm() / (after[:rows] - before).norm()
    assert report.tensors["lm_head.weight"].relative_error == pytest.approx(float(error), rel=1e-5)


def test_what_cannot_be_measured_is_said(tmp_path):
    base, tuned, delta = made(tmp_path)
    text = write_text(tmp_path)
    with pytest.raises(DataError, match="give that as well"):
        verify(delta, base, text=text)
    with pytest.raises(DataError, match="0 tokens measure nothing"):
        verify(delta, base, tuned, text=text, tokens=0)
    with pytest.raises(DataError, match="no calibration text"):
        verify(delta, base, tuned, text=tmp_path / "none.txt")
    for file in (*tuned.glob("tokenizer*"), *delta.glob("tokenizer*")):
        file.unlink()
    with pytest.raises(DataError, match="there is no tokenizer in"):
        verify(delta, base, tuned, text=text)


def test_an_artifact_with_faults_is_not_run(tmp_path, monkeypatch):
    base, tuned, delta = made(tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(sys.modules["deltakeeper.verify"], "measure_agreement", lambda *_, **__: pytest.fail("run"))
    report = verify(delta, base, tuned, text=write_text(tmp_path))
    assert not report.ok and report.text == {}


def test_logits_that_forbid_a_token_count_as_they_should(tmp_path):
    true = torch.tensor([[0.0, 1.0, float("-inf")]])
    other = torch.tensor([[1.0, 0.0, float("-inf")]])
    p, q = true[0, :2].double().softmax(0), other[0, :2].double().softmax(0)
    expected = float((p * (p / q).log()).sum())
    assert float(agreement._divergence(true, other)) == pytest.approx(expected)
    assert float(agreement._divergence(true, torch.tensor([[1.0, float("-inf"), 0.0]]))) == float("inf")
    assert agreement._divergence(true, torch.full((1, 3), float("nan"))).isnan().all()


def test_windows_are_as_long_as_all_models_can_see(tmp_path):
    base, tuned, _ = made(tmp_path)
    text = write_text(tmp_path, words=300)
    assert [len(part) for part in read_windows(text, [tuned, base], 130)] == [64, 64, 2]
    assert [len(part) for part in read_windows(text, [tuned], 10_000, window=200)][:2] == [64, 64]
    assert [len(part) for part in read_windows(text, [tuned], 5)] == [5]
    with pytest.raises(DataError, match="no text"):
        (tmp_path / "empty.txt").write_text(" \n")
        read_windows(tmp_path / "empty.txt", [tuned], 5)


def test_the_command_prints_tables_or_json(tmp_path, monkeypatch, capsys):
    base, tuned, delta = made(tmp_path)

    def run(*more):
        arguments = ["verify", delta, "--base", base, "--tuned", tuned, "--text", write_text(tmp_path), *more]
        monkeypatch.setattr("sys.argv", ["deltakeeper", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "160")
    out = run("--tensors", "2", "--tokens", "64")
    worst = [name for name, _ in verify(delta, base, tuned).worst]
    assert [name in out for name in worst[:3]] == [True, True, False]
    assert "decoded model" in out and "base, for reference" in out and "KL a token" in out
    assert json.loads(run("--json"))["text"]["base"]["tokens"] == 151


def test_a_model_that_does_not_run_is_said_so(tmp_path):
    base, tuned, _ = made(tmp_path)
    windows = read_windows(write_text(tmp_path), [tuned], 20)
    (base / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match=r"base cannot be run \(.*transformers loads"):
        measure_agreement(tuned, {"base": lambda: base}, windows, tmp_path)


def test_measuring_needs_no_particular_folder(tmp_path):
    base, tuned, _ = made(tmp_path)
    windows = read_windows(write_text(tmp_path), [tuned], 20)
    found = measure_agreement(tuned, {"same": lambda: tuned, "base": lambda: base}, windows, tmp_path)
    assert found["same"].kl == 0 and found["base"].kl > 0
    assert not (tmp_path / "logits").exists()
