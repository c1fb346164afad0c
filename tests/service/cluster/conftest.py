"""One tiny base and its tenants on disk for all tests of a service over a cluster."""

from __future__ import annotations

import pytest
from cluster_cases import write_cluster_folder


@pytest.fixture(scope="session")
def cluster_folder(tmp_path_factory):
    """A base and six tenants; a test that changes the deltas copies them."""
    folder = tmp_path_factory.mktemp("cluster")
    write_cluster_folder(folder)
    return folder
