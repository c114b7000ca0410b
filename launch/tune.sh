#!/usr/bin/env bash
# Usage: launch/tune.sh OUT.json [RANKS] [ARGUMENTS…]   measures which collective is fastest for which message size here.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out=${1:?usage: launch/tune.sh OUT.json [RANKS] [ARGUMENTS…]}
torchrun --standalone --nproc-per-node "${2:-2}" -m lowbit_tools tune "$out" "${@:3}"
