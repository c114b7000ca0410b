#!/usr/bin/env bash
# Usage: launch/quickstart.sh [--model DIR|FILE.gguf|HUB-ID] [--text FILE] [--prompt TEXT] [more flags of the demo]
# From a fresh clone to a table: installs into .venv, then runs a real model over two torchrun ranks, its all-reduces
# at 16 and at 4.19 bits a value. A second run reuses what exists. RANKS=N for more ranks; --help for all flags.
set -euo pipefail
began=$SECONDS
"$(dirname "${BASH_SOURCE[0]}")/install.sh"
installed=$SECONDS
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
(torchrun_ranks demo --out "$repository/quickstart" "$@")
echo "installing took $((installed - began)) s, the rest $((SECONDS - installed)) s"
