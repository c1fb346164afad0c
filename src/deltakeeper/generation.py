"""Answers to prompts for a base and any tenants on it, all of them in one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine import Completion, Engine, EngineSettings, Request, Sampling
from deltakeeper.errors import TenantError
from deltakeeper.live_base import LiveBase
from deltakeeper.prompting import Prompt, encode, tokenizers
from deltakeeper.tenancy import published


@dataclass(frozen=True)
class Answer:
    """What was answered to one prompt.

    Attributes:
        tenant: who answered; None for the base.
        prompt: what was asked: a text, or turns of a chat.
        text: the answer.
        finish_reason: `stop`, `length`, or `error`.
        error: what went wrong, if anything.
        prompt_tokens: length of the prompt, template included.
        cached_tokens: those of them that another prompt of the same tenant had computed.
        new_tokens: length of the answer.
    """

    tenant: str | None
    prompt: str | tuple[dict[str, str], ...]
    text: str
    finish_reason: str
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


def check_tenants(prompts: Sequence[Prompt], known: Collection[str]) -> None:
    """Refuse prompts that name a tenant nobody gave, and deltas that no prompt would use.

    Raises:
        TenantError: says which.
    """
    named = {prompt.tenant for prompt in prompts} - {None}
    for name in sorted(named - set(known), key=str):
        have = f"the deltas given are called {', '.join(sorted(known))}" if known else "no delta is given"
        raise TenantError(f"a prompt is for tenant '{name}', but {have}; give it with --delta {name}=PATH.")
    if known and not named:
        raise TenantError(
            f"no prompt names a tenant, so the base would answer alone; give --tenant {sorted(known)[0]} or leave out "
            "--delta."
        )


def answer_prompts(
    base: LiveBase,
    artifacts: Mapping[str, DeltaArtifact],
    prompts: Sequence[Prompt],
    *,
    planes: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    chat: bool | None = None,
    on_text: Callable[[str], None] | None = None,
    settings: EngineSettings | None = None,
) -> list[Answer]:
    """Answer prompts of any tenants side by side; in their order.

    Args:
        base: the base in memory, with its tokenizer.
        artifacts: what each tenant is made of, checked against the base.
        prompts: what is asked, and of whom.
        planes: sign planes to serve; all by default.
        max_new_tokens: length at which an answer is cut.
        sampling: how tokens are chosen; greedily by default.
        chat: whether texts go into the chat template; None for where there is one.
        on_text: called with each piece of the answer as it comes, where there is but one prompt.
        settings: of the engine.

    Raises:
        TenantError: a prompt names a tenant that is not there.
        DataError: a prompt cannot be encoded.
        OverlayError: an artifact does not fit the base.
        EngineError: the model is not served, or a prompt could never be.
    """
    with published(base.model, artifacts, planes=planes) as tenancy:
        words = tokenizers(base.tokenizer, tenancy.deltas)
        requests = [
            Request(
                tuple(encode(words[prompt.tenant], prompt, chat)),
                tenant=prompt.tenant,
                max_new_tokens=max_new_tokens,
                sampling=sampling or Sampling(),
                id=str(number),
            )
            for number, prompt in enumerate(prompts, 1)
        ]
        with Engine(
            base.model, base.tokenizer, overlay=tenancy.overlay, store=tenancy.tenants, settings=settings
        ) as engine:
            if on_text is not None and len(requests) == 1:
                completions = [_streamed(engine, requests[0], on_text)]
            else:
                completions = engine.generate(requests)
    return [_answer(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _streamed(engine: Engine, request: Request, on_text: Callable[[str], None]) -> Completion:
    stream = engine.submit(request)
    while not stream.ended:
        engine.step()
        for token in stream.take():
            if token.text:
                on_text(token.text)
    return stream.completion()


def _answer(prompt: Prompt, completion: Completion) -> Answer:
    return Answer(
        prompt.tenant,
        prompt.content,
        completion.text,
        completion.finish_reason,
        completion.error,
        completion.prompt_tokens,
        completion.cached_tokens,
        len(completion.tokens),
    )
