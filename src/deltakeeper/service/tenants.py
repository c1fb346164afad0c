"""From the name in a request to what answers it: the base, or a tenant that is loaded when it is asked for."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass

from deltakeeper.artifact import MANIFEST_NAME
from deltakeeper.engine.tenant_files import check_name
from deltakeeper.errors import ArtifactError, ChangedError, DeltakeeperError, TenantError, is_lasting
from deltakeeper.service.access import Principal
from deltakeeper.service.errors import NotFound, Refused, ServiceError, Unavailable
from deltakeeper.service.running import Services
from deltakeeper.service.serving_port import HeldTenant
from deltakeeper.service.texts import Texts, Words

_log = logging.getLogger("deltakeeper.service")


@dataclass(frozen=True)
class Model:
    """What a request asks.

    Attributes:
        name: as the request gives it.
        tenant: the same for the engine; None for the base.
        words: its tokenizer.
    """

    name: str
    tenant: str | None
    words: Words


async def check_known(services: Services, principal: Principal, name: str) -> None:
    """Refuse a model that there is not and one that is not theirs, with the same words.

    Raises:
        NotFound: there is none, or not for this key.
    """
    if not principal.may_use(name) or (name != services.base_name and not await _is_tenant(services, name)):
        raise _not_found(name)


async def find_model(services: Services, texts: Texts, principal: Principal, name: str) -> Model:
    """The model of a request, loaded if it is a tenant that is not in memory.

    Raises:
        NotFound: there is none, or not for this key.
        Refused: policy or its canary keeps it out, or its files cannot be served as they are.
        Unavailable: it cannot be loaded now.
    """
    await check_known(services, principal, name)
    if name == services.base_name:
        return Model(name, None, texts.base)
    try:
        try:
            return await _loaded(services, texts, name)
        except ChangedError as error:  # what lies there now is another version, which is looked at anew
            told = "model %s is loaded anew: %s"
            services.notes.repeats.log(_log, logging.WARNING, name, str(error), told, name, error)
            services.store.unload(name)
            return await _loaded(services, texts, name)
    except (DeltakeeperError, TimeoutError) as error:  # it may name paths, which are the operator's business alone
        if not await asyncio.to_thread(_has_files, services, name):
            raise _not_found(name) from error
        _tell(services, name, str(error) or "it was not loaded in time.")
        if isinstance(error, ArtifactError) and is_lasting(error) and services.admission is not None:
            with suppress(TenantError):  # it was removed meanwhile
                folder = services.store.source(name).path
                await asyncio.to_thread(services.admission.decide, name, folder)  # a refusal that is logged
        check_admitted(services, name)
        raise _not_loaded(services, name, error) from error


async def _loaded(services: Services, texts: Texts, name: str) -> Model:
    with await _lease(services, name) as lease:
        services.notes.told.pop(name, None)
        return Model(name, name, await texts.of(lease.version, lease.delta))


def check_still_there(services: Services, name: str) -> None:
    """Say why a tenant's request ended before it ran: the tenant was refused, removed, unloaded or could not be loaded.

    Raises:
        Refused: policy or its canary keeps it out, or its files cannot be served as they are.
        NotFound: it was removed, or its files were.
        Unavailable: asking again may help.
    """
    check_admitted(services, name)
    if not _has_files(services, name):
        raise _not_found(name)
    raise _not_loaded(services, name)


def words_failed(services: Services, name: str, error: DeltakeeperError) -> ServiceError:
    """What it means to whoever asked that a tenant's own tokenizer failed on a prompt; the reason is logged."""
    _tell(services, name, str(error))
    if not is_lasting(error):
        return _not_loaded(services, name, error)
    return Refused(
        f"The tokenizer of the model '{name}' fails on this prompt; whoever runs this finds the reason in the log.",
        param="model",
        code="model_unusable",
    )


def check_admitted(services: Services, name: str) -> None:
    """Refuse a tenant that policy or its canary keeps out; the reasons are for those who run the service.

    Raises:
        Refused: the latest decision on it says so.
    """
    if is_refused(services, name):
        raise Refused(
            f"The model '{name}' is not admitted; whoever runs this finds the reasons in /admin/decisions.",
            param="model",
            code="not_admitted",
        )


def is_refused(services: Services, name: str) -> bool:
    """Whether the latest decision on a tenant keeps it out."""
    decision = None if services.admission is None else services.admission.known(name)
    return decision is not None and decision.verdict == "refused"


def _tell(services: Services, name: str, why: str) -> None:
    """Log why a model cannot be served, once and not for every request; the store repeats it while it waits."""
    told = services.notes.told
    if name not in told or not why.endswith(told[name]):
        told[name] = why
        services.notes.repeats.log(_log, logging.WARNING, name, why, "model %s cannot be served: %s", name, why)


async def _lease(services: Services, name: str) -> HeldTenant:
    async with asyncio.timeout(services.settings.load_seconds):
        while (lease := services.store.acquire(name)) is None:  # a version that came may have had to go at once
            await asyncio.wrap_future(services.store.load(name))
        return lease


def _not_found(name: str) -> NotFound:
    return NotFound(
        f"There is no model {name[:140]!r}; GET /v1/models lists those that this key may ask.",
        param="model",
        code="model_not_found",
    )


def _not_loaded(services: Services, name: str, why: Exception | None = None) -> ServiceError:
    wait, unusable = 0.0, is_lasting(why)  # a cluster's counters say so later
    with suppress(KeyError, TenantError):
        stats = services.store.stats().tenants[name]
        wait, unusable = stats.retry_seconds, unusable or stats.unusable
    if services.metrics is not None:
        services.metrics.rejected("not_loaded")
    if unusable:
        return Refused(
            f"The model '{name}' cannot be served from the files that it has; whoever runs this finds the reason in "
            "/admin/deltas.",
            param="model",
            code="model_unusable",
        )
    return Unavailable(
        f"The model '{name}' cannot be loaded now; ask again later, and if that does not help ask whoever runs this.",
        param="model",
        code="model_not_loaded",
        retry_after=max(wait, services.settings.retry_seconds),
    )


async def _is_tenant(services: Services, name: str) -> bool:
    """Whether a tenant is known by this name; one whose folder came after the start becomes known now."""
    try:
        services.store.state(name)
    except TenantError:
        return await asyncio.to_thread(_discover, services, name)
    return True


def _has_files(services: Services, name: str) -> bool:
    """Whether a name stands for files; where it does not it is being removed, or somebody took them away."""
    try:
        return (services.store.source(name).path / MANIFEST_NAME).is_file()
    except TenantError:
        return False


def may_be_found(services: Services, name: str) -> bool:
    """Whether a name that is not known would become so when it is asked for, by the folder or link that has it."""
    try:
        folder = services.deltas / check_name(name)
        if name in services.notes.put_away or not (folder / MANIFEST_NAME).is_file():
            return False
        return folder.resolve().parent == services.deltas.resolve()
    except (TenantError, OSError):  # no name of a tenant, or it is being removed
        return False


def _discover(services: Services, name: str) -> bool:
    if not may_be_found(services, name):
        return False
    try:
        services.store.register(name, services.deltas / name)  # policy looks at it when it is loaded
        if name in services.notes.put_away:  # meanwhile, so that whoever did it did not find it known
            services.store.remove(name)
            return False
    except TenantError:
        return False
    return True
