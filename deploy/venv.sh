# Sourced by run_production.sh and run_tests.sh: a virtual environment in .venv, made once.
#
#   ensure_installed STAMP EXTRAS...    installs with the first of EXTRAS that installs, unless done
#
# "Done" means done with this setup.cfg, pyproject.toml and venv.sh. The installation is editable:
# after a change of the code nothing has to be installed again.

find_python() {
  local name
  for name in ${PYTHON:-} python3.14 python3.13 python3.12 python3.11 python3 python; do
    if "$name" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 15)))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "aioserver needs Python 3.11 or later; set PYTHON to the path of one" >&2
  return 1
}

make_venv() {
  local python
  if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then return; fi
  python=$(find_python)
  rm -rf .venv
  echo "making .venv with $("$python" --version)" >&2
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
    return 1
  }
}

ensure_installed() {
  local stamp=".venv/$1" wanted extras
  shift
  wanted=$(cat setup.cfg pyproject.toml deploy/venv.sh | cksum)
  if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  make_venv
  for extras in "$@"; do
    echo "installing aioserver-gateway$extras into .venv" >&2
    if .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extras"; then
      echo "$wanted" >"$stamp"
      return
    fi
  done
  echo "the installation failed" >&2
  return 1
}
