#!/usr/bin/env bash
# Installs the test extras into .venv if need be, lints, type-checks, runs the suite on both loops.
# Options go to pytest.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. deploy/venv.sh
ensure_installed installed-tests '[test]'
# The pages are tested in Debian's Chromium. Without one those tests skip; with CI=true they fail.
if [ "$(id -u)" = 0 ] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq -y install --no-install-recommends chromium; } >/dev/null ||
    echo 'no Chromium could be installed' >&2
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# The tests mostly wait: three processes are quicker than one, also on two cores.
exec .venv/bin/python -m pytest -n "${TEST_PROCESSES:-3}" --dist worksteal "$@"
