#!/usr/bin/env bash
# Take docs/report.png from a finished run: docs/screenshot.sh runs/demo/report.html (needs chromium).
set -euo pipefail
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$(mktemp -d)" --hide-scrollbars \
  --window-size=1280,1500 --screenshot="$(dirname "$0")/report.png" "file://$(realpath "$1")"
