"""Calibration text: documents from a file, and as rows of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltakeeper.errors import DataError

MAX_TEXT_BYTES = 64 * 2**20

Document = str | list[dict[str, str]]
"""A text, or a conversation as a list of `{"role": ..., "content": ...}`."""


def read_text(path: str | Path) -> list[Document]:
    """Documents of a file: the paragraphs of a `.txt`, or the lines of a `.jsonl` with `text` or `messages`.

    Raises:
        DataError: the file is missing, too large, empty, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no calibration text at {path}; check the path.")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise DataError(f"{path} is neither .txt nor .jsonl; give calibration text as one of them.")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(f"{path} is larger than 64 MiB, of which little would be read; give a part of it.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
    text = text.replace("\r\n", "\n")
    documents: list[Document]
    if path.suffix.lower() == ".txt":
        documents = [part.strip() for part in text.split("\n\n") if part.strip()]
    else:
        lines = enumerate(text.split("\n"), start=1)
        documents = [_document(line, f"{path}, line {number},") for number, line in lines if line.strip()]
    if not documents:
        raise DataError(f"{path} holds no text; check the file.")
    return documents


def tokenise(tokenizer: Any, documents: Sequence[Document], *, samples: int, length: int) -> list[torch.Tensor]:
    """Documents one after the other, each closed by the end token, cut into rows of equal length.

    Args:
        tokenizer: a transformers tokenizer; conversations need its chat template.
        documents: what `read_text` gives.
        samples: most rows.
        length: tokens in a row; the last row may be shorter.

    Returns:
        int64 tensors `(tokens,)`; what does not fit is left out.

    Raises:
        DataError: a conversation for a tokenizer without chat template, or no tokens at all.
    """
    if samples < 1 or length < 1:
        raise DataError(f"calibration on {samples} rows of {length} tokens reads nothing; give at least 1 and 1.")
    ids: list[int] = []
    for document in documents:
        if len(ids) >= samples * length:
            break
        if isinstance(document, str):
            found = tokenizer(document, verbose=False)["input_ids"]
        else:
            found = tokenizer(_render(tokenizer, document), add_special_tokens=False, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        ids += found if end is None or found[-1:] == [end] else [*found, end]
    if not ids:
        raise DataError("the calibration text gives no tokens; give more of it.")
    whole = torch.tensor(ids[: samples * length], dtype=torch.int64)
    return list(torch.split(whole, length))


def stack_rows(rows: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
    """Rows of equal length stacked, in order: `(rows, tokens)` each."""
    found: list[list[torch.Tensor]] = []
    for row in rows:
        if found and len(found[-1]) < batch and found[-1][0].shape == row.shape:
            found[-1].append(row)
        else:
            found.append([row])
    return [torch.stack(group) for group in found]


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the calibration text has conversations but the model has no chat template; give plain texts.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise DataError(f"the model's chat template refuses a conversation ({error}); leave it out.") from error


def _document(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); correct it.") from error
    if isinstance(value, dict) and isinstance(value.get("text"), str) and value["text"].strip():
        return str(value["text"])
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(f'{where} has neither a "text" nor a list "messages" of roles and contents; correct it.')
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
