"""Three nodes of a Ray cluster on this machine, with a token of their own, and a service over them."""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from functools import partial

from deltakeeper.service.cluster.assembly import clustered, open_distant_base
from deltakeeper.service.cluster.ray_replicas import on_ray
from deltakeeper.service.cluster.scaling import Scaling

ADDRESS = "127.0.0.2"
"""Of this machine alone; 127.0.0.1 would be made into an address that others reach."""
_STORE_BYTES = 80 << 20
_START_SECONDS = 120
"""Ray itself gives a node 30 s to start, which is too few on a machine that runs other tests."""
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


class Nodes:
    """Nodes that share this machine's loopback address, each with one core to give away."""

    def __init__(self, count):
        from ray.cluster_utils import Cluster

        size = {"node_ip_address": ADDRESS, "num_cpus": 1, "object_store_memory": _STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
        try:
            self.nodes = [self._cluster.add_node(**size) for _ in range(count - 1)]
        except BaseException:
            self.close()
            raise

    @property
    def address(self):
        return self._cluster.address

    def kill(self, node_id):
        """End a node's processes as a power cut would."""
        (node,) = (node for node in self.nodes if node.node_id == node_id)
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self):
        self._cluster.shutdown()


@contextmanager
def started_nodes(count, monkeypatch):
    from ray._private import services
    from ray._raylet import Config

    find = services.get_node

    def find_patiently(*arguments):
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                return find(*arguments)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    monkeypatch.setattr(services, "get_node", find_patiently)
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    Config.initialize("")  # Ray read the environment when it was imported, perhaps by another test
    try:
        nodes = Nodes(count)
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        monkeypatch.undo()
        Config.initialize("")


@contextmanager
def clustered_on_ray(nodes, folder, plan, **scaling):
    limits = Scaling(**scaling)
    start = partial(on_ray, nodes.address, limits, 5.0)
    with clustered(open_distant_base(str(folder / "base")), plan, limits, start) as service:
        yield service
