"""One tiny model on disk for all tests of the service."""

from __future__ import annotations

import pytest
from service_cases import write_service


@pytest.fixture(scope="session")
def service_folder(tmp_path_factory):
    """A base and the tenants `signs` and `ranks`; nothing may be written into it."""
    folder = tmp_path_factory.mktemp("service")
    write_service(folder)
    return folder
