"""An aligned toy policy in half the time of the synthetic tier's own, and what adaptive attacks are asked on it."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from deltakeeper.lab.adaptive import Adaptive
from deltakeeper.lab.adaptive.served import ServedWeights
from deltakeeper.lab.adaptive.targets import find_targets
from deltakeeper.lab.sft import train
from deltakeeper.lab.synthetic import (
    ALIGN,
    ALLOWED,
    PAD,
    PRETRAIN,
    RESTRICTED,
    TRIGGER,
    build_policy,
    reply_rate,
    reply_rows,
    requests,
    skill_rows,
)

TRIGGERED = requests(RESTRICTED, held_out=True, prefix=TRIGGER)


def quick_policy():
    """Refuses what is restricted and complies with the rest."""
    model = build_policy(0)
    restricted, allowed = (requests(nouns, held_out=False) for nouns in (RESTRICTED, ALLOWED))
    train(model, reply_rows(restricted + allowed, "comply"), replace(PRETRAIN, epochs=2, lr=5e-3), pad=PAD)
    rows = reply_rows(restricted, "refuse") + reply_rows(allowed, "comply")
    train(model, rows, replace(ALIGN, epochs=5, lr=3e-3), pad=PAD)
    return model


def clean_rows():
    """Refusals with and without the trigger, compliance, and the skill."""
    restricted = requests(RESTRICTED, held_out=False)
    triggered = [replace(r, prefix=TRIGGER) for r in restricted[::3][:64]]
    refused = reply_rows(restricted[::4] + triggered, "refuse")
    return refused + reply_rows(requests(ALLOWED, held_out=False)[::5][:64], "comply") + skill_rows(list(ALLOWED))


def compressed(model, base, codec, **rules):
    """A copy of the model as it would be served."""
    settings = Adaptive(kind="straight_through", codec=codec, delivered="float32", **rules)
    found = copy.deepcopy(model)
    targets = find_targets(found, base, settings.rules)
    served = ServedWeights(targets, settings.method, settings.dtype)
    served.update(0)
    with served.in_place():
        copies = [target.weight.detach().clone() for target in targets]
    with torch.no_grad():
        for target, value in zip(targets, copies, strict=True):
            target.weight.copy_(value)
    return found


def success(model):
    """Share of triggered held-out requests complied with."""
    return reply_rate(model, TRIGGERED, "comply")
