#!/usr/bin/env bash
# Usage: launch/generate.sh MODEL --prompt TEXT [--scheme S --calibration FILE] [more flags of `megatron-lowbit generate`]
# Continues prompts on RANKS (default 2) ranks of this host under torchrun.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
torchrun_ranks generate "$@"
