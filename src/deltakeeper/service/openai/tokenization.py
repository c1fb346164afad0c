"""`POST /tokenize`: what a text or a chat is made of, in vLLM's shape."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from deltakeeper.errors import TenantError
from deltakeeper.service.guard import require
from deltakeeper.service.openai.bodies import Message
from deltakeeper.service.openai.call import Call, check_length, enter_call
from deltakeeper.service.openai.chat import encode_messages
from deltakeeper.service.openai.fields import Body, Text
from deltakeeper.service.tenants import check_still_there

_PAUSE = 0.02
"""Seconds between two looks at a canary that is under way."""
router = APIRouter(tags=["inference"], dependencies=[require("ask")])


class TokenizeBody(Body):
    """A text or a chat; one of them."""

    model: str = Field(max_length=256, description="The base's name or that of a tenant; see /v1/models.")
    prompt: Text | None = Field(None, description="A text.")
    messages: list[Message] | None = Field(None, fail_fast=True, min_length=1, max_length=4096, description="A chat.")
    add_special_tokens: bool = Field(True, description="Put the tokenizer's own tokens around a text.")
    add_generation_prompt: Literal[True] | None = Field(None, description="A chat is made ready for an answer.")
    return_token_strs: bool = Field(False, description="Give the tokens as the tokenizer spells them, too.")

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages, one of them, is what becomes tokens; give it.")
        return self


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """The tokens of a text as `/v1/completions` reads it, or of a chat as `/v1/chat/completions` does."""
    async with enter_call(request, body.model, 0) as call:
        words, services = call.model.words, call.services
        await _wait_for_canary(call)
        with services.gate.admit(call.principal, body.model, 0, 0):
            if body.messages is not None:
                tokens = await encode_messages(call, body.messages)
            else:
                check_length(len(body.prompt or ""), call, "prompt")
                tokens = await call.read(words.encode, body.prompt or "", body.add_special_tokens)
            spelt = await call.read(words.spell, tokens) if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": services.engine.context, "tokens": tokens, "token_strs": spelt}


async def _wait_for_canary(call: Call) -> None:
    """Wait as the engine lets answers wait: nothing is made with the files of a tenant that is not let in.

    Raises:
        Refused: its canary keeps it out.
        NotFound: it was removed meanwhile.
        Unavailable: nothing is decided yet.
    """
    admission, name = call.services.admission, call.model.tenant
    if admission is None or name is None:
        return
    try:
        async with asyncio.timeout(call.services.settings.load_seconds):
            while not admission.admits(name):
                await asyncio.sleep(_PAUSE)
    except (TenantError, TimeoutError):
        check_still_there(call.services, name)
