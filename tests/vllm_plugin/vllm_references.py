"""What transformers computes for the prompts of these tests, with artifacts merged into their base in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from vllm_server import Answer

from deltakeeper.apply import iterate_merged
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint


def open_model(base: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def merged(base: Path, delta: Path):
    """The base with an artifact merged into it, unrounded."""
    model = open_model(base)
    with open_checkpoint(base) as checkpoint:
        weights = dict(iterate_merged(checkpoint, open_artifact(delta), torch.float32))
    lost = model.load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys and set(lost.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@torch.inference_mode()
def answer(model, prompt: list[int], tokens: int = 8) -> Answer:
    """What `VllmServer.ask` should give."""
    given = model(torch.tensor([prompt]), use_cache=True)
    logits = given.logits[0].float().log_softmax(-1)
    rated = logits[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    said, chances = [int(logits[-1].argmax())], [float(logits[-1].max())]
    while len(said) < tokens:
        given = model(torch.tensor([said[-1:]]), past_key_values=given.past_key_values, use_cache=True)
        last = given.logits[0, -1].float().log_softmax(-1)
        said.append(int(last.argmax()))
        chances.append(float(last.max()))
    return Answer(tuple(rated), tuple(said), tuple(chances))


def gap(one: Answer, other: Answer) -> float:
    """How far two answers' log-probabilities are apart at most; those of unlike tokens do not count as near."""
    same = one.tokens == other.tokens and len(one.prompt) == len(other.prompt)
    pairs = zip(one.prompt + one.chances, other.prompt + other.chances, strict=True)
    return max(abs(a - b) for a, b in pairs) if same else float("inf")
