"""How many replicas there are, where, and how much each of them takes."""

from __future__ import annotations

from dataclasses import dataclass

from deltakeeper.errors import DataError


@dataclass(frozen=True)
class Scaling:
    """Limits of a service over a cluster.

    Attributes:
        min_replicas: that always run; to start one takes as long as to load the base.
        max_replicas: that run at most; as many as `min_replicas` for no autoscaling.
        target_ongoing: requests of a replica, on average, above which another is started.
        max_ongoing: requests that a replica takes at once; a tenant whose replica is full is served by another too.
        per_node: replicas on one node.
        cpus: cores that each of them asks the cluster for.
        tries: how often a request is asked at most, while replicas are lost.
        start_seconds: how long the first replica may take to start.

    Raises:
        DataError: a limit is not positive, or there are fewer replicas at most than at least.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: float = 32.0
    max_ongoing: int = 128
    per_node: int = 1
    cpus: float = 1.0
    tries: int = 4
    start_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise DataError(f"cluster setting {name} is {value}; give a positive number.")
        if self.max_replicas < self.min_replicas:
            raise DataError(
                f"{self.max_replicas} replicas at most are fewer than {self.min_replicas} at least; give more."
            )
