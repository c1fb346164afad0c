"""From a body to requests of the engine: limits, tokens, and how many of them an answer may have."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltakeeper.engine import Request
from deltakeeper.service.errors import BadRequest
from deltakeeper.service.openai.answering import Answering
from deltakeeper.service.openai.bodies import ChatBody, CompletionBody
from deltakeeper.service.openai.call import Call
from deltakeeper.service.tenants import Model


@dataclass(frozen=True)
class Exchange:
    """What all chunks of one answer share.

    Attributes:
        id: of the answer.
        created: seconds since 1970.
        kind: `object` in OpenAI's JSON.
        model: as it was asked.
    """

    id: str
    created: int
    kind: str
    model: str

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk or a whole answer."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def open_exchange(prefix: str, kind: str, model: str) -> Exchange:
    """An answer with a fresh id."""
    return Exchange(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), kind, model)


def check_prompt(tokens: Sequence[int], model: Model, context: int, param: str) -> None:
    """Refuse a prompt that could not be answered.

    Raises:
        BadRequest: it is empty, leaves no room for an answer, or has a token that the model does not know.
    """
    if not tokens:
        raise BadRequest("The prompt is empty; give at least one token.", param=param)
    if len(tokens) >= context:
        raise BadRequest(
            f"The prompt has {len(tokens)} tokens, but prompt and answer may have {context} together; shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    if model.words.vocabulary is not None and max(tokens) >= model.words.vocabulary:
        raise BadRequest(
            f"The prompt has a token outside the vocabulary of {model.words.vocabulary}; use the model's tokenizer.",
            param=param,
        )


def ask(
    call: Call,
    body: ChatBody | CompletionBody,
    prompts: Sequence[Sequence[int]],
    *,
    longest: int | None,
    echo: bool = False,
) -> Answering:
    """Hand in one request an answer: `n` of them for the first prompt, then those for the second, and so on.

    Args:
        call: who asks what.
        body: how tokens are chosen, and what ends an answer.
        prompts: token ids, each checked.
        longest: tokens of an answer; None for what the service gives by default, 0 to rate the prompts only.
        echo: whether log-probabilities of the prompt are wanted too; the first of the `n` answers has them for all.

    Raises:
        BadRequest: more log-probabilities are asked for than one answer may have.
        ServiceError: see `Answering`.
    """
    services, model, logprobs = call.services, call.model, body.rated
    wanted = services.settings.default_new_tokens if longest is None else max(1, longest)
    if services.settings.max_new_tokens is not None:
        wanted = min(wanted, services.settings.max_new_tokens)
    requests = [
        Request(
            tuple(prompt),
            tenant=model.tenant,
            max_new_tokens=min(wanted, services.engine.context - len(prompt)),
            sampling=body.sampling(model.words.defaults, logprobs, choice),
            stop=body.stops,
            stop_tokens=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            prompt_logprobs=logprobs if echo and not choice else None,
            owner=call.principal.key_id or "",
            cache_salt=_salt(call, body),
            id=call.request_id,
        )
        for prompt in prompts
        for choice in range(body.n)
    ]
    if logprobs is not None:
        places = sum(one.max_new_tokens + (len(one.prompt) if echo else 0) for one in requests)
        _check_entries(places * max(1, logprobs), services.settings.max_logprob_entries, body)
    return Answering(
        services, call.principal, model.name, requests, choices=body.n, counted=longest != 0, arrived=call.arrived
    )


def _salt(call: Call, body: ChatBody | CompletionBody) -> str:
    """What keeps cached blocks apart: the key, and what its holder adds to tell their own users apart."""
    return "\0".join([call.principal.key_id or "", *([body.cache_salt] if body.cache_salt else [])])


def _check_entries(entries: int, most: int, body: ChatBody | CompletionBody) -> None:
    if entries > most:
        raise BadRequest(
            f"Up to {entries} log-probabilities would be reported, and {most} is the most; ask for fewer of them, for "
            "shorter or fewer answers, or for fewer prompts at once.",
            param=body.rated_by,
        )
