#!/usr/bin/env bash
# Usage: launch/bench_all_reduce.sh [--tokens 1,16,128,1024] [--hidden 4096] [--schemes S,S,…] [--json FILE]
# Times the collectives beside torch's own all-reduce on RANKS (default 2) ranks of this host under torchrun.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
torchrun_ranks bench all-reduce "$@"
