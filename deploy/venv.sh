# Sourced by run_production.sh and run_tests.sh: a virtual environment in .venv, made once.
#
#   ensure_installed STAMP EXTRAS...    installs with the first of EXTRAS that installs, unless done
#
# "Done" means done with this setup.cfg, setup.py, pyproject.toml and venv.sh. The installation is editable:
# after a change of the code nothing has to be installed again. A new .venv gets the newest Python for which
# every package has a wheel, so that no compiler is needed; PYTHON names another one.

# Prints the Pythons that will do, the newest first, one on a line.
find_pythons() {
  local name names=(python3.15 python3.14 python3.13 python3.12 python3.11 python3 python)
  if [ -n "${PYTHON:-}" ]; then names=("$PYTHON"); fi
  for name in "${names[@]}"; do
    if "$name" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 16)))' 2>/dev/null; then
      echo "$name"
    fi
  done
}

# make_venv PYTHON: makes .venv anew.
make_venv() {
  rm -rf .venv
  echo "making .venv with $("$1" --version)" >&2
  "$1" -m venv .venv || {
    rm -rf .venv
    echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
    return 1
  }
}

# install EXTRAS [OPTIONS OF PIP...]
install() {
  local extras=$1
  shift
  echo "installing aioserver-gateway$extras into .venv" >&2
  # compat: a line in a .pth file, which type checkers follow, and no hook for imports, which they do not know.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" \
    --config-settings editable_mode=compat --editable ".$extras"
}

ensure_installed() {
  local stamp=".venv/$1" wanted extras python pythons=()
  shift
  wanted=$(cat setup.cfg setup.py pyproject.toml deploy/venv.sh | cksum)
  if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    mapfile -t pythons < <(find_pythons)
    if [ "${#pythons[@]}" = 0 ]; then
      echo "aioserver needs Python 3.11 or later; set PYTHON to the path of one" >&2
      return 1
    fi
    for python in "${pythons[@]}"; do
      make_venv "$python" || return 1
      if install "$1" --only-binary :all:; then
        echo "$wanted" >"$stamp"
        return
      fi
    done
    make_venv "${pythons[0]}" || return 1
  fi
  for extras in "$@"; do
    if install "$extras"; then
      echo "$wanted" >"$stamp"
      return
    fi
  done
  echo "the installation failed" >&2
  return 1
}
