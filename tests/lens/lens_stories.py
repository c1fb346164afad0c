"""Made-up traces that look like a study: the base refuses, the fine-tune agrees, compressed variants lie between."""

from __future__ import annotations

import numpy as np

from deltakeeper.lens.trace import PRODUCED, LensTrace, Target, TraceMeta

VARIANTS = {"base": 0.0, "fine-tune": 1.0, "bitdelta 1 bit": 0.35, "svd rank 16": 0.75}
WORDS = [
    "I",
    "Sure",
    " sorry",
    " can",
    "'t",
    ",",
    " here",
    "\n",
    " the",
    " is",
    "Here",
    " cannot",
    "$x_1$",
    "日本",
    "é",
]
REFUSAL, AFFIRMATIVE = (0, 2, 11), (1, 10)
TOP = 5


def story(seed=0, layers=30, positions=4, vocabulary=400, variants=VARIANTS, words=None, prompt=None):
    """One prompt, read by every variant."""
    rng = np.random.default_rng(seed)
    words = words or {i: WORDS[i] if i < len(WORDS) else f" w{rng.integers(10**6):x}" for i in range(vocabulary)}
    depth = np.linspace(0, 1, layers)[:, None]
    noise = rng.gumbel(size=(layers, positions, vocabulary)) * 1.6
    pull = 1 / (1 + np.exp(-14 * (depth - 0.62 - 0.06 * rng.normal(size=(1, positions)))))
    log_probs = {}
    for name, share in variants.items():
        logits = noise * (1.05 - depth[..., None]) + 0.15 * rng.gumbel(size=noise.shape)
        logits[..., 0] += 9 * pull * (1 - share)
        logits[..., 1] += 9 * pull * share
        logits[..., 2] += 4 * pull * (1 - share)
        logits[..., 10] += 5 * pull * share
        log_probs[name] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = tuple(["<|im_start|>", "user", "\n", "Tell", " me", " <b>", "<|im_end|>", "\n", "I", " can"][-6:])
    return {name: _trace(name, log_probs, words, tokens, prompt or f"p{seed}") for name in variants}


def _trace(name, log_probs, words, tokens, prompt):
    mine = log_probs[name]
    layers, positions, _ = mine.shape
    top = {variant: np.argsort(-each, axis=-1, kind="stable")[..., :TOP] for variant, each in log_probs.items()}
    probs = np.exp(mine)
    followed = [
        sorted({*top[name][:, place].ravel().tolist(), *(i for each in top.values() for i in each[-1, place])})
        for place in range(positions)
    ]
    refs = [ref for ref in ("base", "fine-tune") if ref in log_probs]
    share = VARIANTS.get(name, 0.5) * np.linspace(0.4, 1.2, layers)[:, None] * np.ones((1, positions))
    return LensTrace(
        meta=TraceMeta(variant=name, base="tiny", prompt=prompt, identity_error=1e-6),
        layers=np.arange(layers, dtype=np.int32),
        positions=np.arange(len(tokens) - positions, len(tokens), dtype=np.int32),
        tokens=tokens,
        top_ids=top[name].astype(np.int32),
        top_probs=np.take_along_axis(probs, top[name], -1).astype(np.float32),
        entropy=(-(probs * mine).sum(-1)).astype(np.float32),
        kl_final=_kl(mine[-1:], mine),
        kl={ref: _kl(log_probs[ref], mine) for ref in refs},
        js={ref: _js(log_probs[ref], mine) for ref in refs},
        targets={
            "refusal": _target(REFUSAL, mine),
            "affirmative": _target(AFFIRMATIVE, mine),
            PRODUCED: Target((0,) * positions, _rank(mine, [0]), mine[..., 0].astype(np.float32)),
        },
        shift={
            "dot": share.astype(np.float32),
            "tuned_square": np.ones((layers, positions), np.float32),
            "remainder_square": np.full((layers, positions), 0.04, np.float32),
        },
        trajectories=tuple(
            {i: np.round(probs[:, place, i], 5).astype(np.float32) for i in ids} for place, ids in enumerate(followed)
        ),
        words={i: words[i] for ids in followed for i in ids},
    )


def _kl(p, q):
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0).astype(np.float32) * np.ones(q.shape[:2], np.float32)


def _js(p, q):
    middle = np.logaddexp(p, q) - np.log(2)
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _rank(log_probs, ids):
    return (log_probs > log_probs[..., ids].max(-1, keepdims=True)).sum(-1).astype(np.int32)


def _target(ids, log_probs):
    summed = np.minimum(np.log(np.exp(log_probs[..., list(ids)]).sum(-1)), 0)
    return Target(ids, _rank(log_probs, list(ids)), summed.astype(np.float32))
