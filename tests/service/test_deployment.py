"""The files in deploy/, which no test here runs: they agree with the service, with each other and with the docs."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from deltakeeper import cli
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine.blocks import BLOCK
from deltakeeper.engine.kv_cache import LayerShape
from deltakeeper.live_base import open_base
from deltakeeper.loopback import is_loopback
from deltakeeper.overlay import attach
from deltakeeper.service import health
from deltakeeper.service.admission.policy import read_policy
from deltakeeper.service.assembly import Plan, assembled
from deltakeeper.service.guard import guarded_routes
from deltakeeper.service.metrics import metrics_router
from deltakeeper.service.server import _GOODBYE_SECONDS as GOODBYE
from deltakeeper.service.settings import ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
sys.path.append(str(ROOT / "benchmarks"))  # last: it has a coverage.py
sizing = importlib.import_module("sizing")
KUBERNETES = DEPLOY / "kubernetes"
DOCS = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
KINDS = {route.path: kind for route, kind in guarded_routes([*health.router.routes, *metrics_router().routes])}
USER, GIB = 10001, 1 << 30


def lines_of(path):
    """Logical lines of a Dockerfile or a unit, comments left out."""
    return [
        line.strip() for line in re.sub(r"\\\n", " ", path.read_text()).splitlines() if line.strip() and line[0] != "#"
    ]


def documents():
    """Everything that is applied to a cluster, by kind and name."""
    found = {}
    for path in KUBERNETES.glob("*.yaml"):
        for item in yaml.safe_load_all(path.read_text()):
            if "kind" in item:
                found[item["kind"], item.get("metadata", {}).get("name")] = item
    return found


DOCKER = lines_of(DEPLOY / "Dockerfile")
UNIT = [line.split("=", 1) for line in lines_of(DEPLOY / "deltakeeper.service") if "=" in line]
UNIT_OF = dict(UNIT)
COMPOSE = yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", (DEPLOY / "compose.yaml").read_text()))["services"]
CLUSTER = documents()
POD = CLUSTER["StatefulSet", "deltakeeper"]["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]


def in_docker(word):
    return [line.removeprefix(word).strip() for line in DOCKER if line.startswith(f"{word} ")]


COMMANDS = {
    "image": json.loads(in_docker("CMD")[-1]),
    "compose": COMPOSE["deltakeeper"]["command"],
    "kubernetes": CONTAINER["args"],
    "systemd": shlex.split(UNIT_OF["ExecStart"])[1:],
}


def parsed(words):
    """Options of a command line, as the command itself reads them; fails on one that it does not know."""
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(command.name, list(words)).params


SERVED = {where: parsed(words) for where, words in COMMANDS.items()}


@pytest.mark.parametrize("where", SERVED)
def test_the_service_is_started_with_options_that_it_has(where):
    found = SERVED[where]
    assert found["port"] == 8000
    assert is_loopback(found["host"]) == (where == "systemd")
    assert not found["public_metrics"]


def test_an_option_that_is_not_there_would_be_found():
    with pytest.raises(typer.BadParameter.__base__, match="no-such"):
        parsed([*COMMANDS["image"], "--no-such=1"])


def test_a_drain_ends_before_the_process_is_killed():
    compose = int(COMPOSE["deltakeeper"]["stop_grace_period"].removesuffix("s"))
    grace = {"compose": compose, "systemd": int(UNIT_OF["TimeoutStopSec"])}
    grace["kubernetes"] = POD["spec"]["terminationGracePeriodSeconds"]
    for where, seconds in grace.items():  # twice, since on busy cores the end of the process takes its time too
        served = SERVED[where]
        assert seconds >= served["lame_duck_seconds"] + 2 * (served["drain_seconds"] + GOODBYE), where
    probe = CONTAINER["readinessProbe"]
    assert SERVED["kubernetes"]["lame_duck_seconds"] >= probe["periodSeconds"] * probe["failureThreshold"]
    assert UNIT_OF["KillSignal"] == "SIGTERM" and UNIT_OF["KillMode"] == "mixed"


def test_probes_ask_routes_that_are_open_and_scrapers_have_a_key():
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert [probe["path"] for probe in probes.values()] == ["/health", "/health", "/ready"]
    (check,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", in_docker("HEALTHCHECK")[0])
    assert check == "/health"
    assert all(KINDS[path] == "public" for path in ("/health", "/ready"))
    assert {probe["port"] for probe in probes.values()} == {"http"}

    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    (endpoint,) = CLUSTER["ServiceMonitor", "deltakeeper"]["spec"]["endpoints"]
    assert KINDS[job["metrics_path"]] == KINDS[endpoint["path"]] == "measure"
    assert job["static_configs"][0]["targets"] == ["deltakeeper:8000"]
    assert Path(job["authorization"]["credentials_file"]).name in COMPOSE["prometheus"]["secrets"]
    secret = endpoint["authorization"]["credentials"]
    assert f"create secret generic {secret['name']} --from-file={secret['key']}=" in DOCS


def test_the_dashboard_is_where_grafana_looks():
    mounts = {
        target: source for source, target, _ in (v.split(":") for v in COMPOSE["grafana"]["volumes"] if v[0] == ".")
    }
    assert all((DEPLOY / source).is_file() for source in mounts.values())
    (provider,) = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert mounts[f"{provider['options']['path']}/deltakeeper.json"] == "./grafana.json"
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["url"].split("/")[2].split(":")[0] in COMPOSE


def test_the_image_has_what_it_copies_and_runs_as_nobody_in_particular():
    copied = [word for line in in_docker("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    ignored = lines_of(DEPLOY / "Dockerfile.dockerignore")
    assert ignored[0] == "*" and {line[1:] for line in ignored if line[0] == "!"} == set(copied)
    assert [line.split()[0] for line in in_docker("FROM")] == ["python:3.11-bookworm", "python:3.11-slim-bookworm"]
    directives = re.findall(r"^#\s*(\w+)\s*=", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert not directives  # `syntax` has the builder fetch an image more
    assert in_docker("USER") == [f"{USER}:{USER}"] and in_docker("EXPOSE") == ["8000"]
    torch_, *_ = (line for line in in_docker("RUN") if "pip install" in line)
    assert re.search(r'--no-deps --index-url "\$TORCH_INDEX" -c constraints.txt torch &&', re.sub(r"\s+", " ", torch_))
    assert all("-c constraints.txt" in part for line in in_docker("RUN") for part in line.split("pip install")[1:])


def test_what_is_asked_of_memory_and_cores_is_there():
    asked, given = SERVED["kubernetes"], CONTAINER["resources"]["limits"]
    llama = sizing.synthetic.decoder(*sizing.MODELS["Llama-3.1-8B"])
    base = 2 * sizing.synthetic.count(llama) / GIB
    assert int(given["memory"].removesuffix("Gi")) >= base + asked["deltas_gib"] + asked["kv_gib"] + 3
    assert asked["threads"] == int(given["cpu"]) - 1


def test_manifests_refer_to_what_there_is():
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    apart = {"kustomization.yaml", "policy.yaml", "loader.yaml", "servicemonitor.yaml", "ingress.yaml"}
    assert {path.name for path in KUBERNETES.glob("*.yaml")} == {*listed["resources"], *apart}
    (policy,) = listed["configMapGenerator"]
    assert read_policy(KUBERNETES / policy["files"][0]).policy.max_bytes == 4 * GIB
    assert SERVED["kubernetes"]["policy"] == Path("/policy/policy.yaml")

    labels = POD["metadata"]["labels"].items()
    for kind in ("StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = CLUSTER[kind, "deltakeeper"]["spec"]
        selector = spec.get("selector", spec.get("podSelector"))
        assert selector.get("matchLabels", selector).items() <= labels, kind
    assert [port["name"] for port in CONTAINER["ports"]] == ["http"] and CONTAINER["ports"][0]["containerPort"] == 8000
    assert CLUSTER["Service", "deltakeeper"]["spec"]["ports"][0]["targetPort"] == "http"
    assert CLUSTER["NetworkPolicy", "nothing"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (rule,) = CLUSTER["NetworkPolicy", "deltakeeper"]["spec"]["ingress"]
    assert rule["ports"] == [{"port": "http"}] and rule["from"]

    # the loader makes keys in the database too, and is no pod that requests are sent to
    outward = CLUSTER["NetworkPolicy", "database"]["spec"]["podSelector"]["matchLabels"].items()
    loader = CLUSTER["Pod", "loader"]["metadata"]["labels"].items()
    assert outward <= labels and outward <= loader
    assert not CLUSTER["Service", "deltakeeper"]["spec"]["selector"].items() <= loader


def test_the_ingress_speaks_tls_holds_no_stream_back_and_leads_to_the_service():
    ingress = CLUSTER["Ingress", "deltakeeper"]
    told = ingress["metadata"]["annotations"]
    assert told["nginx.ingress.kubernetes.io/proxy-buffering"] == "off" and told["nginx.org/proxy-buffering"] == "false"
    waits = [int(value.removesuffix("s")) for name, value in told.items() if name.endswith("/proxy-read-timeout")]
    assert len(waits) == 2 and min(waits) > 10 * ServiceSettings().keep_alive_seconds
    sizes = [int(value.removesuffix("m")) for name, value in told.items() if name.endswith("body-size")]
    assert len(sizes) == 2 and min(sizes) << 20 >= ServiceSettings().body_bytes(1 << 18)
    (rule,) = ingress["spec"]["rules"]
    assert [rule["host"]] == ingress["spec"]["tls"][0]["hosts"]
    service = CLUSTER["Service", "deltakeeper"]
    ports = {port["name"] for port in service["spec"]["ports"]}
    for path in rule["http"]["paths"]:
        found = path["backend"]["service"]
        assert found["name"] == service["metadata"]["name"] and found["port"]["name"] in ports


def test_the_ingress_leads_to_every_route_that_a_tenants_key_opens_and_to_no_other(service_folder, tmp_path):
    (rule,) = CLUSTER["Ingress", "deltakeeper"]["spec"]["rules"]
    ways = [(way["path"], way["pathType"]) for way in rule["http"]["paths"]]

    def is_reached(path):
        return any(path == way or (kind == "Prefix" and path.startswith(f"{way}/")) for way, kind in ways)

    shutil.copytree(service_folder / "deltas", tmp_path / "deltas")
    plan = Plan(tmp_path / "deltas", tmp_path / "state.db", tmp_path / "log", "base")
    with assembled(open_base(service_folder / "base"), plan) as service:
        routes = [(route.path, kind) for route, kind in guarded_routes(service.app.routes)]
    assert ("/v1/load_lora_adapter", "manage") in routes
    assert {path for path, _ in routes if is_reached(path)} == {path for path, kind in routes if kind == "ask"}


@pytest.mark.parametrize("pod", [POD["spec"], CLUSTER["Pod", "loader"]["spec"]], ids=["service", "loader"])
def test_pods_have_no_rights_and_write_to_volumes_alone(pod):
    (container,) = pod["containers"]
    assert not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"]
    assert pod["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER}.items()
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]} and "/tmp" in mounts.values()
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {name for kind, name in CLUSTER if kind == "PersistentVolumeClaim"}
    for path in (SERVED["kubernetes"][name] for name in ("base", "deltas", "decisions")):
        assert any(Path(path).is_relative_to(mount) for mount in mounts.values())


def test_containers_of_compose_gain_no_rights_and_are_reached_from_this_machine_alone():
    for name, service in COMPOSE.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert ":" in service["image"] and not service["image"].endswith(":latest"), name
    assert COMPOSE["deltakeeper"]["read_only"] and COMPOSE["deltakeeper"]["cap_drop"] == ["ALL"]
    assert COMPOSE["postgres"]["profiles"] == ["postgres"]
    targets = [volume.rsplit("}", 1)[-1].split(":")[1] for volume in COMPOSE["deltakeeper"]["volumes"]]
    assert targets == ["/base", "/deltas", "/state"]


def test_the_unit_is_closed_but_for_its_state():
    expected = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": "", "UMask": "0077"}
    assert UNIT_OF.items() >= expected.items() and UNIT_OF["User"] not in ("", "root")
    state = Path("/var/lib") / UNIT_OF["StateDirectory"]
    served = SERVED["systemd"]
    assert all(Path(served[name]).is_relative_to(state) for name in ("base", "deltas", "decisions"))
    assert f"DELTAKEEPER_STATE={state}/" in UNIT_OF["Environment"]


def test_what_is_installed_by_hand_is_what_the_image_installs():
    by_hand = DOCS.split("## systemd")[1].split("```")[1]
    prepared, installed = by_hand.split("python3.11 -m venv")
    for package in ("g++", "python3.11-dev", "python3.11-venv"):  # without the first two it goes on, and is slow
        assert package in prepared.split("apt-get install")[1].split(), package
    assert "backend().name" in installed
    (index,) = (line.split("=", 1)[1] for line in in_docker("ARG") if line.startswith("TORCH_INDEX"))
    assert f"pip install --no-deps --index-url {index} -c constraints.txt torch" in installed
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [re.findall(r"'\.\[([\w,]+)\]'", text) for text in (installed, " ".join(in_docker("RUN")))]
    assert asked[0] == asked[1] and set(asked[0][0].split(",")) <= known.keys()


def test_no_file_holds_a_secret():
    for path in DEPLOY.rglob("*"):
        if path.is_file() and not {".env", "secrets"} & set(path.parts):
            assert not re.search(r"dk-[\w-]{16,}|://\w+:[^@\s{$]+@|BEGIN \w* ?PRIVATE", path.read_text()), path
    assert not any(kind == "Secret" for kind, _ in CLUSTER)
    settings = {k: v for service in COMPOSE.values() for k, v in service.get("environment", {}).items()}
    assert {v for k, v in settings.items() if "PASSWORD" in k} == {
        "/run/secrets/postgres-password",
        "/run/secrets/grafana-password",
    }
    assert set(lines_of(DEPLOY / ".gitignore")) == {"secrets/", ".env"}


def test_the_commands_of_the_page_are_those_of_the_program():
    found = re.findall(r"deltakeeper (keys create [^\n|>]*)", DOCS)
    assert len(found) == 6
    for line in found:
        words = shlex.split(line)
        given = words if "--state" in words else [*words, "--state", "in the image's environment"]
        assert parsed(given)["name"]
    assert "DELTAKEEPER_STATE=/state/state.db" in " ".join(in_docker("ENV"))
    for path in re.findall(r"\bdeploy/[\w./]+\w", DOCS):
        assert (ROOT / path).exists(), path


def test_the_sizes_are_those_of_tenants_that_are_loaded(tmp_path):
    shapes = sizing.synthetic.decoder(512, 256, 384, 2, 128)
    sizing.synthetic.write_pair(tmp_path, shapes)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    for side in ("base", "tuned"):
        config.save_pretrained(tmp_path / side)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    overlay = attach(model)
    for i, (codec, embeddings) in enumerate(sizing.CODECS):
        compress(tmp_path / "base", tmp_path / "tuned", tmp_path / str(i), codec, embeddings=embeddings)
        tenant = overlay.load(open_artifact(tmp_path / str(i)))
        assert sizing.tenant_bytes(shapes, codec, embeddings) == pytest.approx(tenant.nbytes, rel=0.04), codec
        tenant.close()
    overlay.detach()


def test_the_sizes_are_those_of_the_benchmark_on_the_real_model():
    contests = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text())["rows"]["contests"]
    (measured,) = {
        c["bytes_per_tenant"] for c in contests if c["name"].startswith("ours 1-bit") and c["model"] == "smollm2-135m"
    }
    shapes = sizing.synthetic.decoder(*sizing.MODELS["SmolLM2-135M"])
    assert sizing.tenant_bytes(shapes, "bitdelta") == pytest.approx(measured, rel=0.001)


def test_tokens_of_context_are_those_of_the_cache():
    llama = [LayerShape(kv_heads=8, dim=128)] * 32
    tokens = GIB // sum(shape.block_bytes(torch.bfloat16) for shape in llama) * BLOCK
    (row,) = (line for line in sizing.sizing_table().splitlines() if "tokens of context" in line)
    assert row.split("|")[2].strip() == f"{tokens:,}"


def test_a_codec_whose_size_only_the_data_tell_is_refused():
    with pytest.raises(ValueError, match="leave it out"):
        sizing.tenant_bytes({"w": (8, 8)}, "svd:energy=0.5")
