"""`POST /v1/completions`: texts or tokens go on, and with `echo` the prompts are rated too, as lm-eval needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deltakeeper.engine.stream import Stream, Token
from deltakeeper.service.guard import require
from deltakeeper.service.openai.answering import Answering
from deltakeeper.service.openai.asking import Exchange, ask, check_prompt, open_exchange
from deltakeeper.service.openai.bodies import CompletionBody
from deltakeeper.service.openai.call import open_call
from deltakeeper.service.openai.events import DOCUMENTED, EventStream
from deltakeeper.service.openai.logprobs import CompletionLogprobs
from deltakeeper.service.openai.reading import read_whole, with_usage
from deltakeeper.service.texts import Words

router = APIRouter(prefix="/v1", tags=["inference"], dependencies=[require("ask")])


@router.post("/completions", response_model=None, responses=DOCUMENTED)
async def completions(body: CompletionBody, request: Request) -> Response:
    """Go on from each prompt, as it is."""
    call = await open_call(request, body, len(body.prompts))
    services, model = call.services, call.model
    texts, prompts = await model.words.run(services.settings.encode_seconds, _encode, body, model.words)
    for prompt in prompts:
        check_prompt(prompt, model, services.engine.context, "prompt")
    answering = ask(call, body, prompts, longest=body.max_tokens, logprobs=body.logprobs, echo=body.echo)
    writers = [
        _Writer(body, model.words, texts[choice // body.n], prompts[choice // body.n], stream)
        for choice, stream in enumerate(answering.streams)
    ]
    exchange = open_exchange("cmpl", "text_completion", body.model)
    if body.stream:
        chunks = _chunks(exchange, answering, writers, services.settings.keep_alive_seconds)
        return EventStream(with_usage(chunks, body.stream_options, answering, exchange), answering)
    answers = await read_whole(answering, request.receive)
    choices = [writers[choice].write(choice, tokens, ended=True) for choice, tokens in enumerate(answers)]
    return JSONResponse(exchange.envelope(choices) | {"usage": answering.usage()})


def _encode(body: CompletionBody, words: Words) -> tuple[list[str], list[list[int]]]:
    """Text and tokens of each prompt; the text of one that came as tokens is only needed to give it back."""
    prompts = [words.encode(p, body.add_special_tokens) if isinstance(p, str) else p for p in body.prompts]
    texts = [p if isinstance(p, str) else words.decode(p) if body.echo else "" for p in body.prompts]
    return texts, prompts


async def _chunks(
    exchange: Exchange, answering: Answering, writers: Sequence[_Writer], quiet_seconds: float
) -> AsyncIterator[dict[str, Any] | None]:
    async for part in answering.parts(quiet_seconds):
        if part is None:
            yield None
            continue
        choice = writers[part.choice].write(part.choice, part.tokens, ended=part.ended)
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
        stream: the answer; its log-probabilities of the prompt are there with the first token.
    """

    body: CompletionBody
    words: Words
    text: str
    prompt: Sequence[int]
    stream: Stream
    echoed: bool = False
    logprobs: CompletionLogprobs = field(init=False)

    def __post_init__(self) -> None:
        self.logprobs = CompletionLogprobs(self.words, self.body.logprobs or 0)

    def write(self, index: int, tokens: Sequence[Token], *, ended: bool) -> dict[str, Any]:
        """The next piece; the first one has the prompt in front where it is echoed."""
        echo, self.echoed = self.body.echo and not self.echoed, True
        made = [] if self.body.max_tokens == 0 else tokens  # the engine makes one token at least, and nobody asked
        listed = None
        if self.body.logprobs is not None and (echo or made):
            rated = zip(self.prompt, self.stream.prompt_logprobs or (), strict=False) if echo else ()
            listed = self.logprobs.take([*rated, *((token.id, token.logprobs) for token in made)])
        reason = "length" if self.body.max_tokens == 0 else self.stream.finish_reason
        return {
            "index": index,
            "text": (self.text if echo else "") + "".join(token.text for token in made),
            "logprobs": listed,
            "finish_reason": reason if ended else None,
        }
