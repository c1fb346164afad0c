"""Prompts as people give them: lines of a file, plain text or turns of a chat, and the tokens they become."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError, first_line
from deltakeeper.overlay import TenantDelta
from deltakeeper.overlay.side_files import checked_copy, has_tokenizer, read_tokenizer, reading

MOST_BYTES = 256 << 20
MOST_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """What is asked, and of whom.

    Attributes:
        content: a text, or the turns of a chat with `role` and `content` each.
        tenant: name of the tenant; None for the base.
    """

    content: str | tuple[dict[str, str], ...]
    tenant: str | None = None


_KEYS = {"prompt", "messages", "tenant"}
"""A key that is mistyped must not let the base answer for a tenant."""


def read_prompts(file: Path, tenant: str | None = None) -> list[Prompt]:
    """Prompts of a `.jsonl` file: objects with `prompt` or `messages`, and `tenant` where it is not the base.

    Args:
        file: one object a line.
        tenant: whom lines without a tenant are for.

    Raises:
        DataError: it is larger than 256 MiB, holds no prompt, or a line is something else.
    """
    if not file.is_file():
        raise DataError(f"there is no prompt file {file}; give a .jsonl file.")
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file} is larger than {MOST_BYTES >> 20} MiB; split it.")
    prompts = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 within a text
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8; save it as such.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(_prompt(line, f"line {number} of {file}", tenant))
    if not prompts:
        raise DataError(f"{file} holds no prompts; write one object a line.")
    return prompts


def _prompt(line: str, where: str, tenant: str | None) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where} is not JSON; write it as {{"prompt": "…", "tenant": "…"}}.') from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise DataError(f"{where} needs either a 'prompt' or 'messages'; give one of them.")
    if odd := sorted(set(row) - _KEYS):
        raise DataError(f"{where} has the unknown key {odd[0][:80]!r}; the known ones are {', '.join(sorted(_KEYS))}.")
    whose = row.get("tenant", tenant)
    if whose is not None and not isinstance(whose, str):
        raise DataError(f"the tenant in {where} is not a name; write it as text.")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError(f"the prompt in {where} is not text; write it as text.")
        return Prompt(row["prompt"], whose)
    turns = row["messages"]
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        raise DataError(f"the messages in {where} are not turns of a chat; give each a 'role' and a 'content'.")
    return Prompt(tuple({"role": t["role"], "content": t["content"]} for t in turns), whose)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def encode(tokenizer: Any, prompt: Prompt, chat: bool | None) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: that of the tenant.
        prompt: what is asked.
        chat: whether a text is a user's turn in the chat template; None for where there is a template.

    Raises:
        DataError: there is no template where one is needed or it refuses the turns, or nothing is left to ask.
    """
    whose = "the base" if prompt.tenant is None else f"tenant '{prompt.tenant}'"
    turns = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else list(prompt.content)
    template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt.content, str) and (chat is False or (chat is None and not template)):
        ids = tokenizer(prompt.content)["input_ids"]
    elif chat is False:
        raise DataError("messages of a chat cannot be asked as raw text; leave out --raw or give a prompt.")
    elif not template:
        raise DataError(f"{whose} has no chat template; ask with --raw.")
    else:
        try:
            text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program, and may fail in any way
            told = f"the chat template of {whose} does not take these turns ({first_line(error)}); ask raw."
            raise DataError(told) from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"a prompt for {whose} is empty; give a text.")
    return list(ids)


def tokenizers(base: Any, deltas: Mapping[str, TenantDelta]) -> dict[str | None, Any]:
    """The tokenizer of the base (under None) and of each tenant, which may have words or a chat template of its own.

    Raises:
        ChangedError: a tenant's files are not what they were when it was loaded.
        SideFileError: they cannot be used.
        TenantError: they cannot be read now.
    """
    return {None: base} | {
        name: _tokenizer(base, delta.side_folder, delta.side_files) for name, delta in deltas.items()
    }


def _tokenizer(base: Any, folder: Path, files: Mapping[str, str]) -> Any:
    if has_tokenizer(files):
        return read_tokenizer(folder, files)
    template = _template(folder, files)
    if template is None:
        return base
    own = copy.copy(base)
    own.chat_template = template
    return own


def _template(folder: Path, files: Mapping[str, str]) -> str | None:
    """A chat template that stands beside no tokenizer, in any of the three places where transformers keeps it."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        if name not in files:
            continue
        with checked_copy(folder, files, [name]) as copied, reading(str(folder / name)):
            if (copied / name).stat().st_size > MOST_TEMPLATE_BYTES:
                raise ValueError("it is too large")
            text = (copied / name).read_text(encoding="utf-8")
            found = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
        if isinstance(found, str):
            return found
    return None
