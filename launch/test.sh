#!/usr/bin/env bash
# Usage: launch/test.sh [arguments of pytest]
# Installs into .venv what the tests need, then runs the linter, the formatter's check, the type checker and the whole
# test suite. Exit code: pytest's, or that of the first check that fails.
set -euo pipefail
"$(dirname "${BASH_SOURCE[0]}")/install.sh" test
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$repository"
echo "== ruff"
python -m ruff check .
python -m ruff format --check .
echo "== mypy"
python -m mypy
echo "== pytest"
# the latency suites run once each, untimed: whether they work, not how fast
exec python -m pytest --benchmark-disable "$@"
