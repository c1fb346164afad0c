"""A language model as judge, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from deltakeeper.errors import DataError
from deltakeeper.evals.judges.base import Asked, Seen, Verdict
from deltakeeper.evals.judges.cache import ReplyCache
from deltakeeper.evals.judges.endpoint import Endpoint, Refused, Unreadable, check_address
from deltakeeper.evals.judges.messages import FORMAT_VERSION, build_messages
from deltakeeper.evals.judges.replies import read_reply
from deltakeeper.evals.judges.rubric import Rubric, load_rubric
from deltakeeper.evals.judges.settings import Settings, digest


class LlmJudgeSettings(Settings):
    """Settings of a language model as judge.

    Attributes:
        kind: `llm`.
        name: name under which verdicts are recorded.
        version: to be raised when the model behind an equal name changes.
        base_url: address of the endpoint, `http://127.0.0.1:8000/v1`.
        model: name of the model there.
        rubric: a packaged rubric, or a path relative to the settings file.
        rubric_sha256: refuse a rubric of another hash.
        api_key_env: name of the environment variable that holds the key.
        allow_remote: whether the endpoint may be on another machine; answers then leave this one.
        temperature: 0 for the likeliest reply.
        seed: sent along, and seed of the order in which answers are judged.
        max_tokens: longest reply.
        response_format: `json_schema` asks for JSON by schema and does without where the endpoint refuses that;
            `none` never asks.
        timeout: seconds for one attempt.
        retries: further attempts after faults that may pass.
        concurrency: requests at a time.
        cache: folder of replies, relative to the settings file; None keeps none.
    """

    kind: Literal["llm"]
    name: str = Field(min_length=1, max_length=80)
    version: str = Field(default="1", min_length=1, max_length=80)
    base_url: str = Field(max_length=2000)
    model: str = Field(min_length=1, max_length=400)
    rubric: str = Field(default="compliance", min_length=1, max_length=1000)
    rubric_sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,79}$")
    allow_remote: bool = False
    temperature: float = Field(default=0.0, ge=0, le=2, strict=False)
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_tokens: int = Field(default=300, ge=1, le=8192)
    response_format: Literal["json_schema", "none"] = "json_schema"
    timeout: float = Field(default=60.0, gt=0, le=3600, strict=False)
    retries: int = Field(default=2, ge=0, le=10)
    concurrency: int = Field(default=4, ge=1, le=64)
    cache: str | None = Field(default=None, min_length=1, max_length=1000)

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, base_url: str) -> str:
        return check_address(base_url, allow_remote=True, has_key=False)

    @model_validator(mode="after")
    def _may_be_called(self) -> LlmJudgeSettings:
        check_address(self.base_url, self.allow_remote, self.api_key_env is not None)
        return self


class LlmJudge:
    """Asks a model about every answer by one rubric.

    Equal exchanges are asked once, in an order drawn by the seed, so that no arm comes first; which arm an answer
    belongs to is not known here. A reply that cannot be read is `unparsed`.
    """

    def __init__(self, settings: LlmJudgeSettings, rubric: Rubric, cache: ReplyCache | None = None) -> None:
        self.settings = settings
        self.rubric = rubric
        self._cache = cache
        self._endpoint = Endpoint(
            settings.base_url,
            api_key_env=settings.api_key_env,
            timeout=settings.timeout,
            retries=settings.retries,
        )
        self._schema = settings.response_format == "json_schema"

    def __repr__(self) -> str:
        return f"LlmJudge({self.name!r}, {self.settings.model!r} at {self.settings.base_url}, {self.rubric.name!r})"

    @property
    def name(self) -> str:
        """Name from the settings."""
        return self.settings.name

    @property
    def version(self) -> str:
        """Version from the settings, with that of the rubric."""
        return f"{self.settings.version}+{self.rubric.name}-{self.rubric.version}"

    @property
    def sha256(self) -> str:
        """Hash of what verdicts depend on: endpoint, model, sampling, rubric, wording."""
        s = self.settings
        return digest(
            {
                "base_url": s.base_url,
                "model": s.model,
                "version": s.version,
                "temperature": s.temperature,
                "seed": s.seed,
                "max_tokens": s.max_tokens,
                "response_format": s.response_format,
                "rubric": self.rubric.sha256,
                "format": FORMAT_VERSION,
            }
        )

    @property
    def events(self) -> frozenset[Seen]:
        """What its rubric tells apart."""
        return self.rubric.form.events

    def verdicts(self, asked: Sequence[Asked]) -> list[Verdict]:
        """Judge every exchange.

        Raises:
            DataError: the key is absent, or the endpoint cannot be used.
        """
        self._endpoint.check_key()
        distinct = list(dict.fromkeys(asked))
        random.Random(self.settings.seed).shuffle(distinct)
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="judge")
        try:
            known = dict(zip(distinct, pool.map(self._verdict, distinct), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
            self._endpoint.close()
        return [known[one] for one in asked]

    def _verdict(self, asked: Asked) -> Verdict:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": build_messages(self.rubric, asked),
            "temperature": self.settings.temperature,
            "seed": self.settings.seed,
            "max_tokens": self.settings.max_tokens,
        }
        key = digest({"request": body, "judge": self.sha256})
        text = self._cache.get(key) if self._cache else None
        if text is None:
            try:
                text = self._ask(body)
            except Unreadable:
                return Verdict("unparsed", self.name, self.version, self.sha256)
            if self._cache:
                self._cache.put(key, text)
        reply = read_reply(self.rubric.form, text)
        if reply is None:
            return Verdict("unparsed", self.name, self.version, self.sha256, raw=text)
        return Verdict(reply.label, self.name, self.version, self.sha256, reply.score, text)

    def _ask(self, body: dict[str, Any]) -> str:
        if self._schema:
            schema = {"name": "verdict", "strict": True, "schema": self.rubric.form.schema}
            try:
                return self._endpoint.complete(
                    {**body, "response_format": {"type": "json_schema", "json_schema": schema}}
                )
            except Refused:
                pass
        try:
            text = self._endpoint.complete(body)
        except Refused:
            raise DataError(
                f"the judge at {self.settings.base_url} refuses the request for model '{self.settings.model}' "
                "(HTTP status 400 or 422); check the model's name and max_tokens."
            ) from None
        self._schema = False  # it took the request without the schema, so it is spared the detour from now on
        return text


def open_llm_judge(settings: LlmJudgeSettings, folder: Path) -> LlmJudge:
    """A judge from its settings; relative paths are relative to `folder`. Nothing is called yet."""
    rubric = load_rubric(settings.rubric, folder, settings.rubric_sha256)
    return LlmJudge(settings, rubric, None if settings.cache is None else ReplyCache(folder / settings.cache))
