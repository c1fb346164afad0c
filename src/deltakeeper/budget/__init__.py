"""Meet a size: which settings each tensor gets so that the whole artifact stays within a number of bytes."""

from deltakeeper.budget.allocation import Allocation, TensorPlan, allocate, target_bytes
from deltakeeper.budget.forecast import Forecast, forecast
from deltakeeper.budget.sizes import parse_ratio, parse_size
from deltakeeper.budget.weigh import Weigh, check_weigh, weigh_errors

__all__ = [
    "Allocation",
    "Forecast",
    "TensorPlan",
    "Weigh",
    "allocate",
    "check_weigh",
    "forecast",
    "parse_ratio",
    "parse_size",
    "target_bytes",
    "weigh_errors",
]
