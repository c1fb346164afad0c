"""Metrics for Prometheus: vLLM's names where routers and dashboards read those, and our own for what vLLM has not."""

from deltakeeper.service.metrics.routes import metrics_router
from deltakeeper.service.metrics.service_metrics import ServiceMetrics

__all__ = ["ServiceMetrics", "metrics_router"]
