#!/usr/bin/env bash
# Usage: launch/install.sh [test]
# Makes .venv in the repository and installs the project into it, editable, with the versions of constraints.txt;
# with `test` also what the tests need. Does nothing where that is done already.
# PYTHON: the interpreter (default python3). MLB_TORCH_INDEX: a package index for torch instead of the choice below.
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$repository/.venv"
python="${PYTHON:-python3}"
extras="${1:-run}"

if ! command -v "$python" >/dev/null; then
    echo "install.sh: no $python found; install Python 3.10 or later, or say which: PYTHON=/path/to/python3 $0" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "install.sh: $("$python" --version) is too old, 3.10 or later is needed; say which: PYTHON=python3.12 $0" >&2
    exit 2
fi

fingerprint="$({
    echo "$repository"
    "$python" --version
    cd "$repository" && cat constraints.txt pyproject.toml setup.py kernels/lowbit_kernels/csrc/*
} | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
stamp="$environment/.installed-$extras"
if [[ -f "$stamp" && "$(<"$stamp")" == "$fingerprint" ]]; then
    echo "environment $environment is up to date"
    exit 0
fi

echo "== environment $environment ($("$python" --version))"
rm -f "$environment"/.installed-*
# an environment that was moved here, or made by another Python, starts anew
if ! grep -qs "$environment/" "$environment/bin/pip" ||
    [[ "$("$environment/bin/python" --version 2>/dev/null)" != "$("$python" --version)" ]]; then
    "$python" -m venv --clear "$environment"
fi
pip=("$environment/bin/python" -m pip --disable-pip-version-check)

if [[ -n "${MLB_TORCH_INDEX:-}" ]]; then
    echo "== torch from $MLB_TORCH_INDEX"
    "${pip[@]}" install --no-deps --index-url "$MLB_TORCH_INDEX" -c "$repository/constraints.txt" torch
elif ! command -v nvidia-smi >/dev/null; then
    # PyTorch's index has a build without CUDA (200 MB instead of several GB). Where it cannot be reached (a mirror),
    # pip says so and takes torch from the index it is set up with; --no-deps, so that it tries only once.
    echo "== torch for the CPU (no nvidia-smi found)"
    "${pip[@]}" install --no-deps --timeout 15 --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
        -c "$repository/constraints.txt" torch
fi

echo "== megatron-lowbit and what it needs"
target="$repository"
if [[ "$extras" != run ]]; then
    target="${repository}[$extras]"
fi
"${pip[@]}" install -c "$repository/constraints.txt" -e "$target"
if ! "$environment/bin/python" -c 'import lowbit_kernels; lowbit_kernels.get_backend("cpu")' 2>/dev/null; then
    echo "note: no C compiler found (gcc or clang): codecs run in plain torch, with the same results but slower"
fi
echo "$fingerprint" >"$stamp"
echo "$fingerprint" >"$environment/.installed-run"
