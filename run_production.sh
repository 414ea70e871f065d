#!/usr/bin/env bash
# Installs into .venv if need be, then serves config.yaml. Options go to `aioserver serve`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. deploy/venv.sh
ensure_installed installed-production '[speedups,cli,cluster,jwt]' '[speedups,cli]' '[speedups]' ''
exec .venv/bin/python -m aioserver serve "$@"
