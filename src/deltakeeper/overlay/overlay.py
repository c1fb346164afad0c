"""The overlay: a live decoder that computes every row for the tenant that it belongs to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.errors import OverlayError
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.overlay.current import CurrentPass
from deltakeeper.overlay.discover import find_sites
from deltakeeper.overlay.head import HeadSite
from deltakeeper.overlay.joint import JointLinears
from deltakeeper.overlay.loading import load_tenant
from deltakeeper.overlay.names import LiveNames
from deltakeeper.overlay.norms import RmsNormSite
from deltakeeper.overlay.placing import LiveModel
from deltakeeper.overlay.site import Site
from deltakeeper.overlay.tables import Tables
from deltakeeper.overlay.tenant import TenantDelta

_MARK = "_deltakeeper_overlay"


class Overlay:
    """A live decoder with tenants, made by `attach`.

    Outside of `rows` the model computes the base, as if nothing were attached. Inside, linear layers multiply the rows
    of all tenants by the base's weight once and add each tenant's packed terms; norms, biases, embeddings and routers
    are chosen row by row. Parameters, their names and the modules themselves stay where they are.

    Attributes:
        model: the decoder.
    """

    def __init__(self, model: nn.Module, merge_from: int | None) -> None:
        self.model = model
        self._current = CurrentPass(merge_from)
        self._sites = find_sites(model, self._current)
        self._by_module = {site.module: site for site in self._sites.values()}
        self._tables = Tables(self._sites.values())
        self._live = _describe(model, self._sites, self._tables)
        self._published: dict[int, TenantDelta] = {}
        self._lock = threading.Lock()
        self._handles: list[Any] = []
        self._attached = True
        head = next((site for site in self._sites.values() if isinstance(site, HeadSite)), None)
        if head is not None and getattr(model.config, "final_logit_softcapping", None):
            # Squashed logits turn minus infinity into a number, so those of missing tokens are masked once more.
            self._handles.append(model.register_forward_hook(_masking(head)))
        for site in self._sites.values():
            site.open()
        model.__dict__[_MARK] = self

    @property
    def vocabulary(self) -> int:
        """Width of the logits: tokens of the base or of the published tenant that has most."""
        heads = [site.columns for site in self._sites.values() if isinstance(site, HeadSite)]
        return max(heads, default=0)

    def joint(self, modules: Sequence[nn.Module]) -> JointLinears:
        """The products of several linear modules of one input `(rows, in)`, made together where that can be."""
        parts = [self._by_module.get(module, module) for module in modules]
        return JointLinears(parts, self._tables, self._current)

    def norm(self, module: nn.Module) -> RmsNormSite | None:
        """How the norm of a module is computed, where it is one of `x / rms(x) * weight`."""
        site = self._by_module.get(module)
        return site if isinstance(site, RmsNormSite) else None

    @property
    def pass_under_way(self) -> CurrentPass:
        """Rows of the pass under way; one object for the overlay's life."""
        return self._current

    @property
    def published(self) -> dict[int, TenantDelta]:
        """Tenants by slot."""
        return dict(self._published)

    def load(self, artifact: DeltaArtifact, *, planes: int | None = None) -> TenantDelta:
        """Read, check and hold what an artifact changes. Slow; any thread; the live model is not touched.

        Args:
            artifact: made from the very base that is live; the caller compares their hashes.
            planes: sign planes to serve, from the coarsest on; all by default.

        Raises:
            OverlayError: it does not fit the live model, or its configuration computes something else.
            ArtifactError: its payload was altered.
        """
        self._require_attached()
        with torch.inference_mode(False), torch.no_grad():
            return load_tenant(self._live, artifact, planes)

    def publish(self, delta: TenantDelta) -> int:
        """Give a tenant a slot, 1 or more, from which passes can use it. Between passes; all of it or nothing.

        Raises:
            OverlayError: it is published already, closed, or of another overlay.
        """
        # Tables outlive the caller's inference mode, whose tensors could not be written outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._require_attached()
            if delta.closed or delta.slot is not None:
                state = "closed" if delta.closed else f"published in slot {delta.slot} already"
                raise OverlayError(f"the delta of {delta.side_folder} is {state}; load it once more.")
            if len(delta.numbers) != len(self._tables.numbers) or any(
                self._sites.get(site.name) is not site for site in delta.parts
            ):
                raise OverlayError(
                    f"the delta of {delta.side_folder} was loaded for another overlay; load it with this one."
                )
            slot = next(i for i in range(1, len(self._published) + 2) if i not in self._published)
            try:
                self._tables.reserve(slot, delta.numbers.shape[1])
                for site, part in delta.parts.items():
                    site.put(slot, part)
                self._tables.write(slot, delta.numbers)
            except BaseException:
                self._forget(slot, delta)
                raise
            delta.slot = slot
            self._published[slot] = delta
            return slot

    def retire(self, slot: int) -> TenantDelta:
        """Free a slot and give back its delta, which may be published again or closed. Between passes.

        The caller makes sure that no request uses the slot.

        Raises:
            OverlayError: nothing is published there.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if slot not in self._published:
                raise OverlayError(f"slot {slot} holds no tenant; give one that publish gave.")
            delta = self._published.pop(slot)
            self._forget(slot, delta)
            delta.slot = None
            return delta

    @contextmanager
    def rows(self, groups: RowGroups, head: RowGroups | None = None) -> Iterator[None]:
        """Forward passes inside treat hidden states, flattened to rows, as these groups. No gradients are kept.

        Args:
            groups: one slot a token, in the order of the flattened batch, padding included.
            head: of the rows that reach the head, where the model is asked for some of the logits only.

        Raises:
            OverlayError: a slot holds no tenant, or another pass is under way.
        """
        self._require_attached()
        current = self._current
        current.begin(groups, head, self._published)
        try:
            with torch.no_grad():
                yield
        finally:
            current.end()

    def detach(self) -> None:
        """Take the overlay off: every module computes as before it. Tenants are retired, not closed. Once is enough.

        Raises:
            OverlayError: a pass is under way.
        """
        if self._current.groups is not None:
            raise OverlayError("a pass of this overlay is under way; detach it after the pass.")
        for slot in list(self._published):
            self.retire(slot)
        for site in self._sites.values():
            if self._attached:
                site.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.model.__dict__.pop(_MARK, None)
        self._attached = False

    def _forget(self, slot: int, delta: TenantDelta) -> None:
        if slot < self._tables.slots:
            self._tables.clear(slot)
            for site in delta.parts:
                site.put(slot, None)

    def _require_attached(self) -> None:
        if not self._attached:
            raise OverlayError("this overlay was detached; attach one to the model again.")


def attach(model: nn.Module, *, merge_from: int | None = None) -> Overlay:
    """Attach an overlay to a live Hugging Face decoder, dense or with experts, in evaluation mode on the CPU.

    Args:
        model: whose weights may be quantised; terms are then added to what its layers give.
        merge_from: tenants with so many rows in a pass or more may have their terms merged into the weight, tile by
            tile, rounded as in a merged checkpoint, which is faster for long prompts; never by default.

    Raises:
        OverlayError: one is attached already, or it is no model of transformers.
    """
    if _MARK in model.__dict__:
        raise OverlayError("an overlay is attached to this model already; detach it first.")
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise OverlayError("the model has no configuration of transformers; give a Hugging Face decoder.")
    with torch.inference_mode(False), torch.no_grad():
        return Overlay(model, merge_from)


def _describe(model: nn.Module, sites: dict[str, Site], tables: Tables) -> LiveModel:
    names = LiveNames(model, [name for name, site in sites.items() if hasattr(site.module, "in_features")])
    paths = {module: name for name, module in model.named_modules()}
    ends = {}
    for end, method in (("embedding", "get_input_embeddings"), ("head", "get_output_embeddings")):
        found = getattr(model, method, lambda: None)()
        ends[end] = f"{paths[found]}.weight" if found in paths else None
    return LiveModel(model.config, names, sites, len(tables.numbers), ends["embedding"], ends["head"])


def _masking(head: HeadSite) -> Any:
    def mask(module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor):
            head.mask(logits)

    return mask
