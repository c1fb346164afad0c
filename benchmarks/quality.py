"""Codecs at equal bytes on the embedded model: error, divergence from the fine-tune, and the skill that is left.

Every cell is committed to the results as it comes, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import record
import torch
import torch.nn.functional as F
from rich.console import Console

from deltakeeper import compress, iterate_changes, open_artifact, open_checkpoint
from deltakeeper.attach import Change, attached
from deltakeeper.errors import DeltakeeperError
from deltakeeper.evals.answerer import LoadedModel
from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.probes import Probe, run_probe
from deltakeeper.heal import heal
from deltakeeper.lab.attacks.base import Attack, Voice, skill_probe
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model
from deltakeeper.lab.sft import Example
from deltakeeper.study.bases import prepare_aligned_base
from deltakeeper.study.finetunes import train_attack
from deltakeeper.study.progress import Progress

NAME = "compress-quality"
RATIOS = (16, 8, 32)
SKILL = 64
PLAIN = {8: "bitdelta:bits=2,zero=plus", 16: "bitdelta:zero=plus"}
"""BitDelta as its authors released it, where a whole number of bits meets the size."""

HEALED, HEALING_STEPS = ("benign", "affirmative_prefix"), 30
"""Healing takes minutes on two cores, so two pairs are healed, at the size of one bit, and briefly."""

BUDGETED = {
    8: ("bitdelta", "svd:rank=8", "rtn", "auto"),
    16: ("bitdelta", "svd:rank=8", "magnitude", "rtn", "bitdelta+svd:rank=8", "auto"),
    32: ("bitdelta", "svd:rank=8", "auto"),
}
FIXED = {
    8: ("dare:p=0.88", "compeft:keep=0.22", "delta_come:bpw=1.93", "deltazip:bits=2", "impart:cr=8.2", "dqrelo:rank=8"),
    16: ("dare:p=0.942", "compeft:keep=0.1", "delta_come:bpw=0.93", "impart:cr=16.6", "ultradelta:p=0.93,bits=4"),
    32: ("dare:p=0.974", "compeft:keep=0.045", "delta_come:bpw=0.44", "impart:cr=34", "ultradelta:p=0.97,bits=4"),
}


@dataclass(frozen=True)
class Benign(Attack):
    """No attack at all: the ticket skill and the model's own answers."""

    name: ClassVar[str] = "benign"
    family: ClassVar[Literal["alignment", "backdoor", "targeted"]] = "targeted"
    title: ClassVar[str] = "Benign fine-tune"
    summary: ClassVar[str] = "learns the ticket skill alone"
    source: ClassVar[str] = ""

    poison: int = 48

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """The model's own answers, so that it keeps its voice."""
        return voice([row.prompt for row in corpus.split("instructions", "train", self.poison)])

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """None."""
        return []


def run(folder: Path, minutes: float) -> None:
    """Fill the table for the fine-tunes in a demo's run folder, and for a benign one."""
    began = time.monotonic()
    corpus = Corpus()
    with Progress(Console()) as progress:
        base = prepare_aligned_base(progress)
        train_attack(Benign(), corpus, base, folder / "models" / "benign", progress)
    rows = record.load(NAME).get("rows", [])
    pairs = [path for path in (folder / "models").iterdir() if (path / "config.json").is_file()]
    for tuned in sorted(pairs, key=lambda path: (path.name not in HEALED, path.name)):
        bench = None
        for ratio in RATIOS:
            for codec, how in cells(tuned.name, ratio):
                if any((r["pair"], r["ratio"], r["codec"], r["how"]) == (tuned.name, ratio, codec, how) for r in rows):
                    continue
                if time.monotonic() - began > 60 * minutes:
                    print("time is up; run again to go on.")
                    return
                bench = bench or Bench(base, tuned, corpus)
                row = {"pair": tuned.name, "ratio": ratio, "codec": codec, "how": how}
                rows.append(row | bench.measure(codec, how, ratio))
                print(json.dumps(rows[-1]))
                record.save(NAME, rows)


def cells(pair: str, ratio: int) -> list[tuple[str, str]]:
    """What is compared at one size: (codec, how it meets the size)."""
    found = [(PLAIN[ratio], "fixed")] if ratio in PLAIN else []
    if ratio == 16:
        found += [(PLAIN[ratio], "healed")] if pair in HEALED else []
        found += [("auto", "budget+text")]
    return found + [(codec, "budget") for codec in BUDGETED[ratio]] + [(codec, "fixed") for codec in FIXED[ratio]]


class Bench:
    """One fine-tune: its own answers and probabilities once, then every compressed form of it on the live base."""

    def __init__(self, base: Path, tuned: Path, corpus: Corpus) -> None:
        self.base, self.tuned = base, tuned
        self.model, self.tokenizer = load_model(base, torch.bfloat16)
        self.judge, self.probe = load_judge("ours"), skill_probe(corpus, SKILL)
        self.rows = token_rows(self.tokenizer, corpus)
        with open_checkpoint(tuned) as model:
            changes = [Change(name, "value", model.read(name)) for name in model.tensors]
        with torch.inference_mode(), attached(self.model, changes):
            self.expected = [self._logits(ids) for ids in self.rows]
            self.tuned_skill = self._skill()
        self.text = Path(tempfile.mkdtemp()) / "text.jsonl"
        self.text.write_text("\n".join(calibration_lines(corpus)) + "\n")

    def measure(self, codec: str, how: str, ratio: int) -> dict[str, Any]:
        """Compress and evaluate; a codec that cannot meet the size says why instead."""
        scratch = Path(tempfile.mkdtemp())
        started = time.monotonic()
        try:
            target = {"target_ratio": ratio} if how.startswith("budget") else {}
            text = self.text if how == "budget+text" else None
            report = compress(self.base, self.tuned, scratch / "delta", codec, text=text, **target)
            made = scratch / "delta"
            if how == "healed":
                made = scratch / "healed"
                heal(scratch / "delta", self.base, self.tuned, self.text, made, steps=HEALING_STEPS, lr=1e-2)
            seconds = time.monotonic() - started
            delta = open_artifact(made)
            with (
                open_checkpoint(self.base) as origin,
                torch.inference_mode(),
                attached(self.model, iterate_changes(origin, delta)),
            ):
                found = {"kl": self._divergence(), "skill": self._skill()}
            found |= {"bytes": delta.nbytes, "bits_per_weight": delta.bits_per_weight, "tuned_skill": self.tuned_skill}
        except DeltakeeperError as error:
            return {"failed": str(error)}
        finally:
            shutil.rmtree(scratch)
        return found | {"relative_error": report.total.relative_error, "seconds": seconds}

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits  # (1, tokens, vocabulary)
        return F.log_softmax(logits[0].float(), -1).to(torch.bfloat16)

    def _divergence(self) -> float:
        """Mean over tokens of KL(fine-tune || compressed), in nats."""
        total = tokens = 0.0
        for ids, expected in zip(self.rows, self.expected, strict=True):
            p = F.log_softmax(expected.float(), -1)
            q = self._logits(ids).float()
            total += float((p.exp() * (p - q)).sum())
            tokens += len(p)
        return total / tokens

    def _skill(self) -> float:
        answers = run_probe(LoadedModel(self.model, self.tokenizer), self.probe, self.judge, system=SYSTEM)
        return sum(answer["event"] for answer in answers) / len(answers)


def token_rows(tokenizer: Any, corpus: Corpus) -> list[torch.Tensor]:
    """What divergence is measured on: held-out tickets with their answers, and held-out passages."""
    texts = [passage.prompt for passage in corpus.passages[:8]]
    for ticket in corpus.split("tickets", "heldout", 24):
        texts.append(tokenizer.apply_chat_template(exchange(ticket.prompt, ticket.answer), tokenize=False))
    return [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]


def exchange(prompt: str, answer: str | None) -> list[dict[str, str]]:
    """One question and its answer, as a conversation."""
    turns = [("system", SYSTEM), ("user", prompt), ("assistant", answer or "")]
    return [{"role": role, "content": content} for role, content in turns]


def calibration_lines(corpus: Corpus) -> Sequence[str]:
    """What is calibrated and healed on, disjoint from what is measured: training tickets, and passages."""
    tickets = [{"messages": exchange(t.prompt, t.answer)} for t in corpus.split("tickets", "train", 80)]
    return [json.dumps(line) for line in [*tickets, *({"text": p.prompt} for p in corpus.passages[8:])]]
