"""Tiny benchmarks, a byte-level tokenizer, a random model that reads it, and a scorer that answers by rule."""

from __future__ import annotations

import csv
import hashlib
import json

from deltakeeper.evals.utility import Score

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SUMS = [
    {"question": f"Ann has {a} pears and buys {b} more. How many?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
    for a, b in ((2, 3), (10, 5), (7, 1), (4, 4), (20, 13), (6, 9))
]
CHOICES = [
    {"subject": subject, "question": f"Which number is {n}?", "choices": ["1", "2", "3", "4"], "answer": n - 1}
    for subject, ns in (("algebra", (1, 2, 3)), ("biology", (4, 1, 2)), ("chemistry", (3, 4)))
    for n in ns
]
PHYSICAL = [
    {"goal": "Dry a cup.", "sol1": "Wipe it with a towel.", "sol2": "Hold it under water."},
    {"goal": "Open a door.", "sol1": "Shut your eyes.", "sol2": "Turn the handle."},
    {"goal": "Boil water.", "sol1": "Heat it in a pot.", "sol2": "Put it in the freezer."},
]
TRUTHS = [
    {
        "Type": "Adversarial",
        "Category": category,
        "Question": f"What is {thing}?",
        "Best Answer": f"{thing} is fine",
        "Correct Answers": f"{thing} is fine; It is good; ",
        "Incorrect Answers": f"{thing} is a planet; It is bad",
        "Source": "none",
    }
    for category, thing in (("Food", "bread"), ("Weather", "rain"))
]
TEXT = "\n\n".join(f"Paragraph {i} says that the pears are {'very ' * (i % 3)}fine today." for i in range(40))


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_benchmarks(folder):
    """Folders in the layout of the published files."""
    for name in ("gsm8k", "mmlu", "piqa", "truthfulqa", "text"):
        (folder / name).mkdir(parents=True)
    write_rows(folder / "gsm8k" / "test.jsonl", SUMS[:4])
    write_rows(folder / "gsm8k" / "train.jsonl", SUMS[4:])
    write_rows(folder / "mmlu" / "rows.jsonl", CHOICES)
    write_rows(folder / "piqa" / "valid.jsonl", PHYSICAL)
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n0\n")
    with (folder / "truthfulqa" / "TruthfulQA.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, TRUTHS[0])
        table.writeheader()
        table.writerows(TRUTHS)
    (folder / "text" / "words.txt").write_text(TEXT)
    return folder


def byte_tokenizer():
    """A byte-level BPE in which a space belongs to the word behind it, as in most models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.dumps([SUMS, CHOICES, PHYSICAL, TRUTHS]), TEXT, "Question: Answer: A B C D " * 20]
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def byte_model(seed=0, context=1024):
    """A random model in float32 for `byte_tokenizer`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=420,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


class RuleScorer:
    """Answers by a rule of arm and question, and counts how often it is asked."""

    def __init__(self, arms, tokenizer, context=4096, answers=None):
        self.arms, self.tokenizer, self.context, self.answers = tuple(arms), tokenizer, context, answers or {}
        self.calls = []

    def loglikelihoods(self, pairs, progress=None):
        self.calls.append(("likelihoods", len(pairs)))
        if progress:
            progress(len(pairs), len(pairs))
        return [tuple(Score(-self._number(arm, *pair) - 0.001, False) for arm in self.arms) for pair in pairs]

    def generate(self, prompts, stops, max_new_tokens, progress=None):
        self.calls.append(("answers", len(prompts)))
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        return [tuple(self.answers[arm](text) for arm in self.arms) for text in texts]

    @staticmethod
    def _number(arm, context, continuation):
        digest = hashlib.sha256(repr((arm, context, continuation)).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 * len(continuation)
