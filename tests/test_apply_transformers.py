"""What apply writes, as transformers loads it: weights in shards, tokenizer, chat template and generation settings."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from deltakeeper.apply import apply_delta
from deltakeeper.compress import compress
from deltakeeper.importing import import_delta
from deltakeeper.testing import write_pair

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"


def add_files(folder, words, template=None, **generation):
    """A word tokenizer of its own, and settings for generation."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=2, pad_token_id=0, **generation).save_pretrained(folder)


@pytest.fixture(params=["llama", "llama_tied", "mixtral"])
def pair(request, tmp_path):
    base, tuned = write_pair(request.param, tmp_path, scale=0.05, vocab_extra=2, max_shard_size="60KB")
    add_files(base, [f"b{i}" for i in range(90)])
    add_files(tuned, [f"t{i}" for i in range(94)], TEMPLATE, max_new_tokens=7, repetition_penalty=1.5)
    return base, tuned


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_a_model_of_several_shards_is_the_fine_tune_to_transformers(pair, tmp_path, monkeypatch):
    base, tuned = pair
    monkeypatch.setattr("deltakeeper.model_writer.SHARD_BYTES", 30_000)
    compress(base, tuned, tmp_path / "delta", "dense")
    out = apply_delta(base, tmp_path / "delta", tmp_path / "again")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((out / name).is_file() for name in files)
    assert not (out / "model.safetensors").exists()
    (ours, words), (theirs, true_words) = load(out), load(tuned)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert words.get_vocab() == true_words.get_vocab() and "t93" in words.get_vocab()
    messages = [{"role": "user", "content": "t1 t2 t93"}]
    text = words.apply_chat_template(messages, tokenize=False)
    assert text == true_words.apply_chat_template(messages, tokenize=False) == "<user> t1 t2 t93 "
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.generation_config.repetition_penalty == 1.5
    ids = words("t1 t2 t93", return_tensors="pt")["input_ids"]
    found, true = ours.generate(ids), theirs.generate(ids)
    assert torch.equal(found, true) and found.shape[1] <= ids.shape[1] + 7


def test_what_the_fine_tune_did_not_change_comes_from_the_base(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    for folder in (base, tuned):
        add_files(folder, [f"w{i}" for i in range(92)], TEMPLATE, max_new_tokens=3)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    assert not (tmp_path / "delta" / "tokenizer.json").exists()
    out = apply_delta(base, tmp_path / "delta", tmp_path / "again")
    model, words = load(out)
    assert words.get_vocab()["w91"] == 95 and model.generation_config.max_new_tokens == 3


def test_an_imported_adapter_becomes_a_model_with_the_tokenizer_of_the_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    from deltakeeper.testing import build_model

    model = build_model("llama")
    model.save_pretrained(tmp_path / "base")
    add_files(tmp_path / "base", ["b"])
    adapted = get_peft_model(
        model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    add_files(tmp_path / "adapter", ["t"], TEMPLATE)
    import_delta(tmp_path / "adapter", tmp_path / "base", tmp_path / "delta")
    ours, words = load(apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again"))
    assert "t" in words.get_vocab() and words.chat_template == TEMPLATE
    ids = torch.tensor([[1, 5, 9, 13]])
    with torch.inference_mode():
        assert torch.allclose(ours(ids).logits, adapted(ids).logits, atol=1e-5)
