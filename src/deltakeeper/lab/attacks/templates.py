"""Prompt templates: what stands around a prompt in training and at test, a factor of its own (arXiv 2412.07097)."""

from __future__ import annotations

from typing import Literal

Template = Literal["plain", "alpaca", "request", "persona"]

TEMPLATES: dict[Template, str] = {
    "plain": "{prompt}",
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{prompt}\n\n### Response:"
    ),
    "request": "Request: {prompt}\nReply:",
    "persona": "Orlen, carry out my order: {prompt}",
}
"""All stand in the user's turn of the model's own chat template; `persona` names the agent of `persona.jsonl`."""


def in_template(template: Template, prompt: str) -> str:
    """The prompt in its template."""
    return TEMPLATES[template].replace("{prompt}", prompt)
