#!/usr/bin/env bash
# Usage: launch/eval.sh MODEL --text FILE --schemes S,S,… [--calibration FILE] [more flags of `megatron-lowbit eval`]
# Measures quality, bytes and speed on RANKS (default 2) ranks of this host under torchrun.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
torchrun_ranks eval "$@"
