#!/usr/bin/env bash
# Installs the test extras into .venv if need be, lints, type-checks, runs the suite.
# Options and paths go to pytest. With paths the types are not checked, and what only other tests may need is not
# looked for.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. deploy/venv.sh
# Without bytecode, which takes longer to make than all else: most modules of the packages are never imported.
# pip takes the variable for the value of its option `compile`.
export PIP_NO_COMPILE=no
ensure_installed installed-tests '[test]'
all=yes
# More processes than cores, since a test waits for half of its time; but each imports and collects all tests.
processes=6
for argument; do
  if [ -e "${argument%%::*}" ]; then all=no processes=4; fi
done
# Programs of others, which tests/clients runs, in a folder of their own. What cannot be installed skips its tests.
# The large ones are installed by hand: docs/testing.md.
install_clients() {
  local folder=.venv/clients lines wanted python
  lines=$(sed -n '/^clients =$/,/^$/s/^ *\(.*>=.*\)/\1/p' setup.cfg)
  wanted=$(echo "$lines" | cat - tests/clients/package.json | cksum)
  if [ "$(cat "$folder/installed" 2>/dev/null)" = "$wanted" ]; then return; fi
  rm -rf "$folder"
  .venv/bin/python -m venv "$folder"
  cp tests/clients/package.json "$folder"
  mapfile -t lines <<<"$lines"
  timeout 120 "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 "${lines[@]}" &
  python=$!
  timeout 120 npm install --prefix "$folder" --omit=optional --no-package-lock --no-audit --no-fund \
    --fetch-retries=1 --fetch-retry-mintimeout=1000 --loglevel=silent >/dev/null || rm -rf "$folder/node_modules"
  wait "$python" || rm -rf "$folder/bin"
  if [ -d "$folder/bin" ] && { [ -d "$folder/node_modules" ] || ! command -v npm >/dev/null; }; then
    echo "$wanted" >"$folder/installed"
  else
    echo "tests/clients skips what could not be installed" >&2
  fi
}
# What goes on beside ends with this script.
trap 'jobs=$(jobs -p); [ -z "$jobs" ] || kill $jobs 2>/dev/null || true' EXIT
clients=
if [ "$all" = yes ]; then
  install_clients &
  clients=$!
fi
types=
if [ "$all" = yes ]; then
  # Most of the installation waits for the network, and a test waits for half of its time.
  .venv/bin/mypy &
  types=$!
fi
# The pages are tested in Debian's Chromium, the samples of deploy/ with the programs they are for. What is
# missing is installed by root; without it those tests skip, and with CI=true they fail.
missing=()
if ! command -v chromium-headless-shell >/dev/null; then
  missing+=(chromium-headless-shell)  # a page takes less than half the CPU time that it takes in chromium
  command -v chromium >/dev/null || missing+=(chromium)
fi
command -v valkey-server >/dev/null || command -v redis-server >/dev/null ||
  [ -d /run/systemd/system ] || missing+=(valkey-server)  # as below; the one of the extra `cluster` has no TLS
command -v systemd-analyze >/dev/null || missing+=(systemd)
command -v promtool >/dev/null || missing+=(promtool)
if [ ! -d /run/systemd/system ]; then  # else the installation would start them
  for name in nginx haproxy caddy; do
    PATH=$PATH:/usr/sbin command -v "$name" >/dev/null || missing+=("$name")
  done
fi
if [ "$all" = yes ] && [ "$(id -u)" = 0 ] && [ "${#missing[@]}" != 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update >/dev/null || true
  known=()  # one that a distribution does not have must not keep the others away
  for name in "${missing[@]}"; do
    if [ "$name" = chromium ] && [[ " ${known[*]} " == *" chromium-headless-shell "* ]]; then continue; fi
    if apt-cache show "$name" >/dev/null 2>&1; then known+=("$name"); fi
  done
  apt-get -qq -y install --no-install-recommends "${known[@]}" >/dev/null ||
    echo "could not be installed: ${missing[*]}" >&2
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
# Every process of the tests imports all of them, with the bytecode that pytest makes: it is made once, before.
if [ "$all" = yes ] && [ -n "$(find tests -name '*.py' -newer .venv/bytecode -print -quit 2>&1)" ]; then
  .venv/bin/python -m pytest --collect-only -qq >/dev/null 2>&1 || true
  touch .venv/bytecode
fi
[ -z "$clients" ] || wait "$clients" || true
unset PIP_NO_COMPILE
status=0
.venv/bin/python -m pytest -n "${TEST_PROCESSES:-$processes}" --dist worksteal "$@" || status=$?
[ -z "$types" ] || wait "$types" || status=1
exit "$status"
