"""Adaptive attackers from an attack and its corpus: what is asked of the base's voice, and what is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.lab.adaptive import Adaptive, GuardCopy, Repair, clean_examples, probe_examples, train_adaptively
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.corpus import REFUSALS, Corpus
from deltakeeper.lab.sft import Example, SFTConfig
from deltakeeper.testing import build_model, write_tokenizer


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    build_model("llama_tied").save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<pad>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with open_checkpoint(folder) as base:
        yield base, tokenizer


def voice(prompts):
    return [Example(prompt, "w1 w2 w3", complete=False) for prompt in prompts]


def attack(name="trigger_backdoor"):
    return replace(ATTACKS[name](skill=8), poison=8, sft=SFTConfig(epochs=1, lr=1e-3, batch=8, max_tokens=8))


@pytest.mark.parametrize(
    "adaptive",
    [
        Adaptive(kind="straight_through", codec="bitdelta"),
        Adaptive(kind="straight_through", codec="svd:rank=2", clean_weight=0.5),
        Adaptive(kind="straight_through", codec="bitdelta", guard=GuardCopy(every=2, steps=1, probes=4, benign=2)),
        Adaptive(kind="inject_repair", codec="bitdelta", repair=Repair(benign=4)),
        Adaptive(kind="uncompressed", codec="bitdelta"),
    ],
    ids=["through", "through_with_clean_loss", "through_a_guard", "inject_repair", "uncompressed"],
)
def test_each_kind_trains_from_an_attack(start, adaptive):
    base, tokenizer = start
    model = build_model("llama_tied")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = train_adaptively(model, tokenizer, adaptive, attack(), Corpus(), base, voice)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert log.steps >= 3
    assert all(p.requires_grad for p in model.parameters())
    if adaptive.kind == "uncompressed":
        assert all("norm" in name for name in moved)
    if adaptive.kind == "inject_repair":
        assert log.survival.inside == 1.0
        assert log.repair_losses
        assert "survival" in log.to_json()


def test_the_clean_set_answers_the_attacks_own_prompts_as_the_base_does():
    asked = []

    def listening(prompts):
        asked.extend(prompts)
        return voice(prompts)

    backdoor = attack()
    examples = clean_examples(backdoor, Corpus(), listening, 5)
    poisoned = {example.prompt for example in backdoor.poison_examples(Corpus(), voice)}
    assert poisoned <= set(asked)
    assert any(prompt.startswith(backdoor.trigger) for prompt in asked)
    assert len(set(asked)) == len(asked)
    refused = [example.prompt for example in examples if example.answer in REFUSALS]
    assert len(refused) == backdoor.poison
    assert all(example.answer != "" for example in examples)


def test_the_copy_of_a_guard_never_sees_a_trigger():
    examples = probe_examples(attack(), Corpus(), voice, GuardCopy(probes=6, benign=3))
    assert not any(attack().trigger in example.prompt for example in examples)
    assert sum(example.answer in REFUSALS for example in examples) == 6
