"""Negative log-likelihood of held-out text, passage by passage, so that models can be compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


@torch.inference_mode()
def passage_nll(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 8) -> tuple[list[float], list[int]]:
    """Summed negative log-likelihood (nats) and number of predicted tokens of each text.

    Texts are read as plain text without a chat template; the first token is context only. Softmax is float32.
    Perplexity over all texts is `exp(sum(nll) / sum(tokens))`.
    """
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    sums, counts = [0.0] * len(texts), [max(0, len(ids) - 1) for ids in encoded]
    order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(encoded[i]) for i in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for j, i in enumerate(rows):  # padding on the right is never attended to by what stands before it
            ids[j, : len(encoded[i])] = torch.tensor(encoded[i])
            mask[j, : len(encoded[i])] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (batch, tokens, vocab)
        for j, i in enumerate(rows):
            n = counts[i]
            sums[i] = F.cross_entropy(logits[j, :n].float(), ids[j, 1 : n + 1], reduction="sum").item()
    return sums, counts
