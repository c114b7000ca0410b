#!/usr/bin/env bash
# Usage: launch/tune.sh OUT.json [--scheme S] [--hidden 4096] [--seconds 40]
# Measures which collective is fastest for which message size on RANKS (default 2) ranks of this host under torchrun.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
torchrun_ranks tune "$@"
