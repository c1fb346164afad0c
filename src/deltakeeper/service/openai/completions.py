"""`POST /v1/completions`: texts or tokens go on, and with `echo` the prompts are rated too, as lm-eval needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from deltakeeper.engine.stream import Logprobs, Stream, Token
from deltakeeper.service.guard import require
from deltakeeper.service.openai.answering import Answering, Part
from deltakeeper.service.openai.asking import Exchange, ask, check_prompt, open_exchange
from deltakeeper.service.openai.bodies import CompletionBody
from deltakeeper.service.openai.call import Call, check_length, open_call
from deltakeeper.service.openai.events import DOCUMENTED, EventStream
from deltakeeper.service.openai.logprobs import CompletionLogprobs
from deltakeeper.service.openai.reading import answer_json, read_whole, with_usage
from deltakeeper.service.texts import Words

router = APIRouter(prefix="/v1", tags=["inference"], dependencies=[require("ask")])


@router.post("/completions", response_model=None, responses=DOCUMENTED)
async def completions(body: CompletionBody, request: Request) -> Response:
    """Go on from each prompt, as it is."""
    async with open_call(request, body, len(body.prompts)) as call:
        services, model = call.services, call.model
        for prompt in body.prompts:
            if isinstance(prompt, str):
                check_length(len(prompt), call, "prompt")
        texts, prompts = await call.read(_encode, body, call)
        answering = ask(call, body, prompts, longest=body.max_tokens, echo=body.echo)
    writers: list[_Writer] = []
    for choice, stream in enumerate(answering.streams):
        at, later = divmod(choice, body.n)
        writers.append(
            _Writer(body, model.words, texts[at], prompts[at], stream, writers[at * body.n] if later else None)
        )
    exchange = open_exchange("cmpl", "text_completion", body.model)
    if body.stream:
        chunks = _chunks(exchange, answering, writers, services.settings.keep_alive_seconds)
        return EventStream(with_usage(chunks, body.stream_options, answering, exchange), answering)
    answers = await read_whole(answering, request.receive)

    def choices() -> list[dict[str, Any]]:
        return [writers[choice].write(choice, tokens, ended=True) for choice, tokens in enumerate(answers)]

    return await answer_json(exchange, choices, answering.usage(), long=body.rated is not None)


def _encode(body: CompletionBody, call: Call) -> tuple[list[str], list[list[int]]]:
    """Text and tokens of each prompt; the text of one that came as tokens is only needed to give it back.

    Raises:
        BadRequest: one cannot be answered; those after it are not looked at.
    """
    words, texts, prompts = call.model.words, [], []
    for given in body.prompts:
        tokens = words.encode(given, body.add_special_tokens) if isinstance(given, str) else given
        check_prompt(tokens, call.model, call.services.engine.context, "prompt")
        texts.append(given if isinstance(given, str) else words.decode(given) if body.echo else "")
        prompts.append(tokens)
    return texts, prompts


async def _chunks(
    exchange: Exchange, answering: Answering, writers: Sequence[_Writer], quiet_seconds: float
) -> AsyncIterator[dict[str, Any] | None]:
    held: list[Part] = []
    async for part in answering.parts(quiet_seconds):
        if part is None:
            yield None
            continue
        held.append(part)
        while ready := [one for one in held if writers[one.choice].ready]:
            held = [one for one in held if not writers[one.choice].ready]
            for one in ready:  # which may make others ready
                choice = writers[one.choice].write(one.choice, one.tokens, ended=one.ended)
                if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                    yield exchange.envelope([choice])


@dataclass
class _Writer:
    """Writes one choice, at once or piece by piece.

    Attributes:
        body: what was asked.
        words: the model's tokenizer.
        text: of the prompt.
        prompt: its tokens.
        stream: the answer.
        first: the writer of the first answer to the same prompt, None if this is it; the prompt's log-probabilities are
            there with that one's first token.
    """

    body: CompletionBody
    words: Words
    text: str
    prompt: Sequence[int]
    stream: Stream
    first: _Writer | None = None
    echoed: bool = False
    logprobs: CompletionLogprobs = field(init=False)

    def __post_init__(self) -> None:
        self.logprobs = CompletionLogprobs(self.words, self.body.logprobs or 0)

    @property
    def ready(self) -> bool:
        """Whether there is all that the next piece needs."""
        return self.first is None or self.first.echoed or not self.body.echo or self.body.logprobs is None

    def write(self, index: int, tokens: Sequence[Token], *, ended: bool) -> dict[str, Any]:
        """The next piece; the first one has the prompt in front where it is echoed."""
        echo, self.echoed = self.body.echo and not self.echoed, True
        made = [] if self.body.max_tokens == 0 else tokens  # the engine makes one token at least, and nobody asked
        listed = None
        if self.body.logprobs is not None and (echo or made):
            listed = self.logprobs.take(
                [*(self._rated() if echo else ()), *((token.id, token.logprobs) for token in made)]
            )
        reason = "length" if self.body.max_tokens == 0 else self.stream.finish_reason
        return {
            "index": index,
            "text": (self.text if echo else "") + "".join(token.text for token in made),
            "logprobs": listed,
            "finish_reason": reason if ended else None,
        }

    def _rated(self) -> Iterable[tuple[int, Logprobs | None]]:
        """The prompt's tokens with their log-probabilities; a first one has none, and so a lone one no list of them."""
        found = (self if self.first is None else self.first).stream.prompt_logprobs
        return zip(self.prompt, found or [None] * len(self.prompt), strict=True)
