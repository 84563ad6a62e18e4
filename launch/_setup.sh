# Sourced by the other scripts here: makes .venv in the checkout and puts it on PATH. Sets MOECT_ROOT.
#
# A finished set-up leaves a stamp; while it matches, nothing is installed. A changed constraints.txt or setup.py is
# installed into the .venv that is there. A set-up that did not finish, a checkout that moved and a python that went
# away begin afresh. PYTHON=/path/to/python chooses the interpreter for a new .venv.

set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX # they would let packages from elsewhere in, or ours out
MOECT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

_say() { printf 'set-up: %s\n' "$*"; }

_stop() {
    printf 'set-up: %s\n' "$*" >&2
    exit 2
}

# Why a python cannot be used; nothing if it can.
_fault() {
    command -v "$1" >/dev/null || { echo "is not there" && return; }
    "$1" -I - 2>/dev/null <<'PYTHON' || echo "does not run"
import importlib.util as util, os, sys, sysconfig
if sys.version_info < (3, 11):
    print("is version %d.%d, older than 3.11" % sys.version_info[:2])
elif not (util.find_spec("venv") and util.find_spec("ensurepip")):
    print("has no venv module (Debian, Ubuntu: apt install python%d.%d-venv)" % sys.version_info[:2])
elif not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print("has no headers (Debian, Ubuntu: apt install python%d.%d-dev)" % sys.version_info[:2])
PYTHON
}

# The pins are tested with 3.11, so it comes first.
_find_python() {
    local candidate fault reasons=""
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        fault="$(_fault "$candidate")"
        [ -z "$fault" ] && { command -v "$candidate" && return; }
        [ "$fault" = "is not there" ] || reasons+="; $candidate $fault"
        [ -z "${PYTHON:-}" ] || _stop "PYTHON=$PYTHON $fault"
    done
    _stop "no python to use: install python 3.11 or newer, with venv and headers$reasons"
}

_stamp() {
    echo "$MOECT_ROOT"
    .venv/bin/python -V 2>/dev/null
    cat constraints.txt setup.py | sha256sum
}

# _stage WORDS COMMAND…: says what it does; shows the end of the log if it fails.
_stage() {
    _say "$1"
    shift
    printf '\n$ %s\n' "$*" >>.venv/install.log
    "$@" >>.venv/install.log 2>&1 </dev/null && return
    tail -n 20 .venv/install.log >&2
    printf 'set-up: that failed; all of its output is in %s\n' "$MOECT_ROOT/.venv/install.log" >&2
    exit 1
}

_pip() { .venv/bin/python -m pip --no-input --disable-pip-version-check "$@" --constraint constraints.txt; }

_install() {
    local python
    if [ "$1" = afresh ]; then
        python="$(_find_python)" || exit
        # all but the lock, which others may be waiting for, and the stamp, which says "unfinished"
        find .venv -mindepth 1 -maxdepth 1 ! -name setup.lock ! -name setup.stamp -exec rm -rf {} +
        _stage "$("$python" -V) from $python, into .venv" "$python" -m venv .venv
    fi
    _stage "build tools" _pip install pip setuptools wheel ninja packaging
    _stage "torch (a GPU build is some gigabytes)" _pip install torch
    # deepspeed's build asks the torch that is there; its operators are compiled when first used
    DS_BUILD_OPS=0 _stage "the other packages" _pip install --no-build-isolation --editable ".[dev]"
    # where the path has a space, pip leaves deepspeed's scripts with a first line that the system cannot read
    if [[ "$MOECT_ROOT" = *" "* ]]; then
        { grep -lIZF "#!$MOECT_ROOT/" .venv/bin/* || true; } | xargs -0r sed -i "1s|^#!/.*|#!/usr/bin/env python|"
    fi
}

_setup() {
    cd "$MOECT_ROOT"
    mkdir -p .venv
    exec 9>>.venv/setup.lock
    if command -v flock >/dev/null && ! flock -n 9; then
        _say "waiting for another set-up of this checkout"
        flock 9
    fi
    local stamp=.venv/setup.stamp how=afresh
    if [ "$(_stamp)" != "$(cat "$stamp" 2>/dev/null)" ]; then
        command -v "${CXX:-g++}" >/dev/null || _stop "no C++ compiler, which deepspeed needs: install g++"
        if [ -z "$(_fault .venv/bin/python)" ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
            # a .venv without a stamp is somebody's own: add to it
            [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$MOECT_ROOT" ] || how=here
        fi
        echo unfinished >"$stamp"
        _install "$how"
        _stamp >"$stamp"
        _say "done"
    fi
    exec 9>&-
}

(_setup)
export VIRTUAL_ENV="$MOECT_ROOT/.venv" PATH="$MOECT_ROOT/.venv/bin:$PATH"
