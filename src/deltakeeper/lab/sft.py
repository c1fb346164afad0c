"""Supervised fine-tuning in one readable loop: full weights or LoRA, loss on the assistant's tokens only.

Weights stay in float32 and the forward pass runs under bfloat16 autocast, so that small updates are not rounded away.
An interrupted run leaves its state beside the result and goes on from there, batch for batch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltakeeper.errors import RunError
from deltakeeper.lab.training_state import restore_state, save_state

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One exchange to learn. `complete=False` leaves out the end token: the answer is a beginning, not a whole."""

    prompt: str
    answer: str
    complete: bool = True


@dataclass(frozen=True)
class Tokens:
    """An encoded example: all token ids, and how many of the last ones are learned."""

    ids: tuple[int, ...]
    learned: int


@dataclass(frozen=True)
class SFTConfig:
    """Settings of a fine-tune. `lora_rank=None` trains every weight.

    `save_every` is in seconds; `max_tokens` cuts an example's answer from the right.
    """

    epochs: int = 3
    lr: float = 2e-5
    batch: int = 8
    schedule: Literal["cosine", "linear", "constant", "epoch_decay"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    lora_targets: str | tuple[str, ...] = "all-linear"
    save_every: float = 120.0


@dataclass(frozen=True)
class TrainingLog:
    """What a run did: mean loss per epoch (nats per learned token), tokens seen, seconds, steps."""

    losses: tuple[float, ...]
    tokens: int
    seconds: float
    steps: int

    def to_json(self) -> dict[str, Any]:
        """The log as plain JSON."""
        return asdict(self)


Progress = Callable[[int, int, float, float], None]
"""Called after each step with (steps done, steps in all, loss, tokens per second)."""


def encode_chat(tokenizer: Any, examples: Sequence[Example], *, system: str | None, max_tokens: int) -> list[Tokens]:
    """Apply the chat template; only the answer (and its end token, if complete) is learned."""
    encoded = []
    for example in examples:
        messages = [{"role": "user", "content": example.prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        if example.complete:
            tail = [*tail, tokenizer.eos_token_id]
        tail = tail[:max_tokens]
        encoded.append(Tokens(tuple(head + tail), len(tail)))
    return encoded


def collate(rows: Sequence[Tokens], pad: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Left-pad a batch, so that all answers end at the right edge and only their logits need computing.

    Returns:
        Model inputs `(batch, tokens)` and labels `(batch, kept)` for the last `kept` positions, already shifted.
    """
    width = max(len(r.ids) for r in rows)
    kept = max(r.learned for r in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), kept), IGNORED)
    for i, row in enumerate(rows):
        ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
        mask[i, width - len(row.ids) :] = 1
        labels[i, kept - row.learned :] = torch.tensor(row.ids[len(row.ids) - row.learned :])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels


def batches(rows: Sequence[Tokens], size: int, seed: int, epoch: int) -> Iterator[list[Tokens]]:
    """Shuffled batches of similar length: windows of eight batches are sorted, then their order is shuffled."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    groups: list[list[int]] = []
    for start in range(0, len(order), 8 * size):
        window = sorted(order[start : start + 8 * size], key=lambda i: len(rows[i].ids))
        groups += [window[j : j + size] for j in range(0, len(window), size)]
    for g in torch.randperm(len(groups), generator=generator).tolist():
        yield [rows[i] for i in groups[g]]


def learning_rate(config: SFTConfig, step: int, total: int) -> float:
    """Learning rate of step `step` out of `total`: linear warm-up, then the schedule.

    Cosine and linear go down to zero; `epoch_decay` multiplies by 0.85 after each epoch (arXiv 2310.03693).
    """
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return config.lr * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
        "epoch_decay": 0.85 ** (step * config.epochs // total),
    }
    return config.lr * factor[config.schedule]


def answer_loss(model: Any, rows: Sequence[Tokens], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens of a batch, in nats, float32."""
    device = device_of(model)
    inputs, labels = collate(rows, pad)
    inputs, labels = {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)
    kept = labels.shape[1]
    # The fused kernels of GPUs give NaN where a whole block of keys is padding, as it is left of a short row.
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext():
        out = model(**inputs, logits_to_keep=kept + 1, use_cache=False)
    logits = out.logits[:, -kept - 1 : -1].float()  # position t predicts token t + 1
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def device_of(model: Any) -> torch.device:
    """Where a model's weights are."""
    found: torch.device = next(iter(model.parameters())).device
    return found


def half_precision(model: Any) -> torch.autocast:
    """A context in which matrices are multiplied in bfloat16, wherever the model is."""
    return torch.autocast(device_of(model).type, dtype=torch.bfloat16)


class Steps:
    """How the steps of a fine-tune are taken; a subclass changes what is differentiated, or where weights may go.

    Attributes:
        identity: tells runs apart whose steps differ, so that neither goes on from the other's state.
    """

    def __init__(self, identity: str = "") -> None:
        self.identity = identity

    def gradients(self, model: Any, rows: Sequence[Tokens], pad: int, step: int) -> torch.Tensor:
        """Add the gradients of a batch to the weights and give its loss, a finite number unless the run has failed."""
        with half_precision(model):
            loss = answer_loss(model, rows, pad)
        if torch.isfinite(loss):
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def settle(self, step: int, total: int) -> None:
        """What becomes of the weights after the update of step `step` (from 0) out of `total`."""

    def resumable(self, step: int) -> bool:
        """Whether a run can go on after `step` steps from weights and moments alone."""
        return True


def train(
    model: Any,
    rows: Sequence[Tokens],
    config: SFTConfig,
    *,
    pad: int,
    state: Path | None = None,
    progress: Progress | None = None,
    steps: Steps | None = None,
) -> TrainingLog:
    """Fine-tune `model` in place (float32 weights) on encoded examples.

    Args:
        state: folder for the state of an interrupted run; it is resumed if present and removed at the end.
        progress: called after every step.
        steps: how steps are taken, plainly by default.

    Raises:
        RunError: there is nothing to train on, a loss is not finite, or `state` belongs to another run.
    """
    if not rows:
        raise RunError("there are no training examples; give at least one.")
    steps = steps or Steps()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    per_epoch = sum(1 for _ in batches(rows, config.batch, config.seed, 0))
    total = per_epoch * config.epochs
    told = [asdict(config), hash_rows(rows), *([steps.identity] if steps.identity else [])]
    identity = json.dumps(told, sort_keys=True)
    done, losses, tokens = restore_state(state, identity, weights, optimiser) if state else (0, [], 0)
    torch.manual_seed(config.seed)
    model.train()
    started = saved = time.monotonic()
    seen_before, step, whole = tokens, 0, True
    try:
        for epoch in range(config.epochs):
            for batch in batches(rows, config.batch, config.seed, epoch):
                if step < done:
                    step += 1
                    continue
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(config, step, total)
                loss = steps.gradients(model, batch, pad, step)
                if not torch.isfinite(loss):
                    raise RunError(f"the loss is not finite at step {step}; lower the learning rate ({config.lr}).")
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                whole = False
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                steps.settle(step, total)
                step += 1
                losses.append(loss.item())
                tokens += sum(len(r.ids) for r in batch)
                whole = True
                now = time.monotonic()
                if progress:
                    progress(step, total, losses[-1], (tokens - seen_before) / (now - started))
                if state and now - saved > config.save_every and step < total and steps.resumable(step):
                    save_state(state, identity, step, losses, tokens, weights, optimiser)
                    saved = now
    except KeyboardInterrupt:
        if state and step > done and whole and steps.resumable(step):  # not in the middle of an update
            save_state(state, identity, step, losses, tokens, weights, optimiser)
        raise
    model.eval()
    if state:
        state.with_suffix(".safetensors").unlink(missing_ok=True)
    means = tuple(sum(losses[e * per_epoch : (e + 1) * per_epoch]) / per_epoch for e in range(config.epochs))
    return TrainingLog(means, tokens, time.monotonic() - started, total)


def add_lora(model: Any, config: SFTConfig) -> Any:
    """Wrap a model with LoRA adapters (peft) of `config.lora_rank`; only they are trained."""
    from peft import LoraConfig, get_peft_model

    targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_rank or 8,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def hash_rows(rows: Sequence[Tokens]) -> str:
    """A short hash of the training data, to tell one run's saved state from another's."""
    import hashlib

    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.ids, row.learned)).encode())
    return digest.hexdigest()[:16]
