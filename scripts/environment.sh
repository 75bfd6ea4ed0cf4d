#!/bin/sh
# Makes .venv and installs this project into it, with what `demo` or `dev` (demo, tests, fuzzer and checks) needs.
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of PATH that is new enough.
set -eu
cd "$(dirname "$0")/.."

kind=${1:?usage: scripts/environment.sh demo|dev}
case $kind in
    demo) groups="demo" ;;
    dev) groups="test fuzz check" ;;
    *) echo "scripts/environment.sh: '$kind' is neither demo nor dev" >&2; exit 2 ;;
esac
venv=.venv

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if new_enough "$PYTHON"; then echo "$PYTHON"; return; fi
        echo "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || true); tracelet needs Python 3.11 or newer." >&2
        return 1
    fi
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null 2>&1 && new_enough "$name"; then command -v "$name"; return; fi
    done
    echo "No Python 3.11 or newer on PATH (python3 is $(python3 --version 2>&1 || true))." >&2
    echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

make_venv() {
    python=$(find_python)
    echo "Making $venv with $("$python" --version) ($python)"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
        echo "'$python -m venv' failed: on Debian and Ubuntu the package python3-venv has what it needs." >&2
        return 1
    fi
}

group_flags() {
    for group in $groups; do printf -- '--group %s ' "$group"; done
}

by_uv() {
    # shellcheck disable=SC2046  # flags are words
    uv pip install --quiet --python "$venv/bin/python" --constraint constraints.txt --editable '.[mlflow]' $(group_flags)
}

by_pip() {
    # Dependency groups came with pip 25.1; what a fresh venv holds may be older.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
    # shellcheck disable=SC2046
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable '.[mlflow]' $(group_flags)
}

if ! new_enough "$venv/bin/python"; then make_venv; fi
echo "Installing tracelet and what '$kind' needs into $venv (a few minutes the first time)"
if command -v uv >/dev/null 2>&1; then
    # uv has settings of its own (index, certificates); where these don't fit the network, pip's may.
    by_uv || { echo "uv could not install it; trying pip"; by_pip; }
else
    by_pip
fi
touch "$venv/.ready-demo"
if [ "$kind" = dev ]; then touch "$venv/.ready-dev"; fi
