#!/usr/bin/env bash
# Usage: launch/gpu_check.sh [--out DIR] [--only tests|timing] [--formats F,F,…] [--budget-s S] [--dry-run]
# Runs the tests that need a GPU, then times every kernel beside a copy of the same size; a table comes last, dated rows
# go to benchmarks/results. Under 8 minutes. Installs nothing: a checkout and a python3 with torch and Triton are enough.
# PYTHON: the interpreter (default: that of .venv where there is one, else python3).
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export PYTHONPATH="$repository:$repository/kernels:$repository/tools${PYTHONPATH:+:$PYTHONPATH}"
cd "$repository"
exec "${PYTHON:-python3}" -m lowbit_tools.gpu_check "$@"
