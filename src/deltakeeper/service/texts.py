"""Tokenizers of the base and of tenants, and what they make of prompts."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deltakeeper.overlay import TenantDelta
from deltakeeper.overlay.side_files import has_tokenizer, reading
from deltakeeper.service.errors import BadRequest, Unavailable
from deltakeeper.service.sampling_defaults import SamplingDefaults, read_defaults
from deltakeeper.service.serving_port import ServedBase
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.templates import TemplateEndedError, TemplateError, Templates
from deltakeeper.service.tenant_text import read_text
from deltakeeper.service.turns import Turns

_MOST_KEPT = 256
_RETRY_SECONDS = 1.0
_T = TypeVar("_T")


class Words:
    """One tokenizer.

    One that a tenant brings may fail in any way when it is used: every use raises `SideFileError` then, or
    `TenantError` where only this machine could not do it now.

    Args:
        folder: that of the tenant which brings it; None for the base's.

    Attributes:
        tokenizer: of transformers.
        vocabulary: number of tokens that may stand in a prompt; None where the engine knows better.
        defaults: how tokens are drawn where a request does not say.
        templates: what renders its chats.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int | None = None,
        defaults: SamplingDefaults | None = None,
        templates: Templates | None = None,
        most_unread: int = ServiceSettings.max_unread,
        folder: Path | None = None,
    ) -> None:
        self.tokenizer, self._folder = tokenizer, folder
        self.vocabulary = vocabulary
        self.defaults = defaults or SamplingDefaults()
        self.templates = templates or Templates(tokenizer)
        # A first use may change a tokenizer of Rust, which refuses to be read meanwhile; later ones do not.
        tokenizer("")
        self._turns = Turns(most_unread)
        self._shown: dict[int, str] = {}

    async def chat(self, holder: str | None, seconds: float, turns: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat; see `encode_chat` and `run`."""
        apart = None if self.templates.trusts(self.tokenizer) else self.templates.threads
        return await self.run(holder, seconds, self.encode_chat, turns, threads=apart)

    async def run(
        self,
        holder: str | None,
        seconds: float,
        call: Callable[..., _T],
        *arguments: Any,
        threads: Executor | None = None,
    ) -> _T:
        """Run what is slow, such as a long text, on a thread: one of the loop's unless others are given.

        One call of a model at a time, so that none takes all threads from the others, and by turns among the keys that
        ask it (`holder`); a thread cannot be stopped, so the next call waits for its end even if nobody else does.

        Raises:
            Unavailable: it took longer than this many seconds, or too many of this key wait.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._turns.take(holder)
                try:
                    running = asyncio.get_running_loop().run_in_executor(threads, call, *arguments)
                except BaseException:  # the threads have ended
                    self._turns.give()
                    raise
                running.add_done_callback(self._end_turn)
                return await asyncio.shield(running)
        except TimeoutError as error:
            raise Unavailable(
                "The prompt could not be made into tokens in time; ask again later.", retry_after=_RETRY_SECONDS
            ) from error

    def _end_turn(self, done: asyncio.Future[Any]) -> None:
        self._turns.give()
        if not done.cancelled():
            done.exception()  # it was told to whoever asked, if they still wait

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer puts around it unless `special` is false."""
        with self._used():
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def encode_chat(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the turns of a chat in the tokenizer's own template, ready for an answer.

        Raises:
            BadRequest: there is no template, or it does not take these turns.
            Unavailable: it took too long or too much memory.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise BadRequest(
                "This model has no chat template; ask it with /v1/completions.", param="model", code="no_chat_template"
            )
        try:
            text = self.templates.render(self.tokenizer, turns)
        except TemplateEndedError as error:
            raise Unavailable(
                f"The model's chat template gave no text: {error}; ask again later, or with /v1/completions.",
                param="model",
                code="template_ended",
                retry_after=error.retry_after,
            ) from error
        except TemplateError as error:
            reason = str(error)[:300].rstrip(".")
            raise BadRequest(
                f"The model's chat template does not take these messages: {reason}.", param="messages"
            ) from error
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt that was given as tokens."""
        with self._used():
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def spell(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the tokenizer has them in its vocabulary."""
        with self._used():
            return [str(piece) for piece in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def show(self, token: int) -> str:
        """One token as text, special ones too; what is no whole character is U+FFFD."""
        text = self._shown.get(token)
        if text is None:
            with self._used():
                text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
                piece = self.tokenizer.convert_ids_to_tokens(token)
            if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
                text = f" {text}"  # sentencepiece drops the space in front of what it takes for a beginning
            self._shown[token] = text
        return text

    def _used(self) -> AbstractContextManager[None]:
        return nullcontext() if self._folder is None else reading(f"the tokenizer in {self._folder}")


class Texts:
    """The words of the base and of every version of a tenant that is in memory and was asked lately.

    Args:
        base: with its tokenizer and its folder.
        with_defaults: whether models say how tokens are drawn where a request does not.
        most_unread: requests of one key that may wait at each model; see `Turns`.

    Raises:
        DataError: the base's generation config cannot be used.
    """

    def __init__(
        self, base: ServedBase, *, with_defaults: bool = True, most_unread: int = ServiceSettings.max_unread
    ) -> None:
        self._with_defaults, self._most_unread = with_defaults, most_unread
        self.templates = Templates(base.tokenizer)
        defaults = read_defaults(base.path) if with_defaults else None
        self.base = Words(base.tokenizer, _vocabulary(base.path), defaults, self.templates, most_unread)
        self._kept: dict[str, asyncio.Task[Words]] = {}

    async def of(self, version: str, delta: Any) -> Words:
        """The words of a tenant's version; those of the base where it has none of its own.

        Args:
            version: identity of the delta.
            delta: with `vocabulary`, `side_folder` and `side_files`.

        Raises:
            ChangedError: its files are not what they were when it was loaded.
            SideFileError: they cannot be used.
            TenantError: they cannot be read now.
        """
        task = self._kept.pop(version, None)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._read, delta))
            task.add_done_callback(partial(self._forget_failed, version))
            # it has no part in the budget of deltas, and goes with the delta
            weakref.finalize(delta, self._kept.pop, version, None).atexit = False
        self._kept[version] = task  # the latest at the end
        while len(self._kept) > _MOST_KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        return await asyncio.shield(task)  # others wait for it too

    def _forget_failed(self, version: str, task: asyncio.Task[Words]) -> None:
        """Let the next request read anew, whatever it was that failed."""
        if (task.cancelled() or task.exception() is not None) and self._kept.get(version) is task:
            self._kept.pop(version, None)

    def _read(self, delta: TenantDelta) -> Words:
        text = read_text(self.base.tokenizer, delta, with_defaults=self._with_defaults)
        if not self.templates.trusts(text.tokenizer):
            self.templates.start()
        defaults = text.defaults or self.base.defaults
        own = delta.side_folder if has_tokenizer(delta.side_files) else None
        return Words(text.tokenizer, delta.vocabulary, defaults, self.templates, self._most_unread, own)


def _vocabulary(folder: Path) -> int | None:
    """Tokens that a model knows, by its config; None where that does not say, and the engine alone knows."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return int(config.get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError):
        return None
