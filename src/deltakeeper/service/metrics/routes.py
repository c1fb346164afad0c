"""`GET /metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from deltakeeper.service.errors import NotFound
from deltakeeper.service.guard import Kind, require
from deltakeeper.service.metrics.service_metrics import ServiceMetrics


def metrics_router(kind: Kind = "measure") -> APIRouter:
    """The route of the metrics, which name tenants: for monitors and administrators unless somebody says otherwise.

    Args:
        kind: who may scrape; `public` where nobody but the scraper reaches the address.
    """
    router = APIRouter(tags=["metrics"], dependencies=[require(kind)])

    @router.get("/metrics", response_class=Response)
    def show_metrics(request: Request) -> Response:
        """All series in Prometheus' text format; with keys, give the scraper a monitor's as its bearer token."""
        metrics = request.app.state.services.metrics
        if not isinstance(metrics, ServiceMetrics):
            raise NotFound("This service measures nothing; start it with metrics.")
        return Response(metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
