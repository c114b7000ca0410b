# shellcheck shell=bash
# Sourced by the other scripts: how ranks are started, and the environment they run in. RANKS (default 2) may be set.
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$repository/.venv"
if [[ -x "$environment/bin/python" ]]; then
    PATH="$environment/bin:$PATH"
fi

export RANKS="${RANKS:-2}"
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"
export PYTHONSAFEPATH=1 # the folder you stand in must not shadow an installed package
export PYTHONUNBUFFERED=1
# torchrun's own warnings (host name look-up, thread count) would bury what the ranks say
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"

torchrun_ranks() { # ARGUMENTS of python -m lowbit_tools, on $RANKS ranks of this host
    exec python -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m lowbit_tools "$@"
}
