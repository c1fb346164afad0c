"""`deltakeeper serve --ray`: what cannot be served over a cluster is one sentence and status 2."""

from __future__ import annotations

import sys

import pytest

from deltakeeper import cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--replicas", "3"), "say which one with --ray"),
        (("--target-ongoing", "3"), "say which one with --ray"),
        (("--replica-cpus", "2"), "say which one with --ray"),
        (("--ray", "auto", "--replica-cpus", "0"), "cpus is 0"),
        (("--ray", "auto", "--replicas", "many"), "spell it 3, or 1-3"),
        (("--ray", "auto", "--replicas", "0"), "min_replicas is 0"),
        (("--ray", "auto", "--replicas", "3-2"), "give more"),
        (("--ray", "auto", "--replicas-per-node", "0"), "per_node is 0"),
        (("--ray", "auto", "--policy", "{folder}/none.yaml"), "none.yaml"),
        (("--ray", "auto", "--host", "0.0.0.0"), "there is no key yet"),
        (("--ray", "ray://127.0.0.1:10001"), "start this on a node, with auto"),
        (("--ray", "127.0.0.1:1"), "no Ray cluster at '127.0.0.1:1'"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(cluster_folder, tmp_path, monkeypatch, capsys, arguments, said):
    if "--ray" in arguments:
        pytest.importorskip("ray.serve", exc_type=ImportError)  # which Ray, loaded here, is allowed to warn
    assert refused(cluster_folder, tmp_path, monkeypatch, capsys, *arguments).count(said) == 1


def test_without_ray_it_says_what_to_install(cluster_folder, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("ray_replicas", "served_replica", "routing"):
        monkeypatch.delitem(sys.modules, f"deltakeeper.service.cluster.{name}", raising=False)
    assert "install deltakeeper[ray]" in refused(cluster_folder, tmp_path, monkeypatch, capsys, "--ray", "auto")


def refused(folder, state, monkeypatch, capsys, *arguments):
    given = [argument.format(folder=folder) for argument in arguments]
    files = ("--base", folder / "base", "--deltas", folder / "deltas", "--state", state / "state.db")
    monkeypatch.setattr("sys.argv", ["deltakeeper", "serve", *map(str, files), *given])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.splitlines()[-1].startswith("deltakeeper: ")
    return err
