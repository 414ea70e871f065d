#!/usr/bin/env bash
# Installs into .venv if need be, then serves config.yaml. Options go to `aioserver serve`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. deploy/venv.sh
ensure_installed installed-production '[speedups,cli,cluster,jwt]' '[speedups,cli]' '[speedups]' ''
# The memory of a load then goes back to the system when it is over (docs/performance.md). Python has
# mimalloc from 3.13 on, where it was built with it: others do not start, so it is tried first.
if [ -z "${PYTHONMALLOC+set}" ] && PYTHONMALLOC=mimalloc .venv/bin/python -S -c '' 2>/dev/null; then
  export PYTHONMALLOC=mimalloc
fi
exec .venv/bin/python -m aioserver serve "$@"
