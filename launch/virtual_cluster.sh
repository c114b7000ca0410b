#!/usr/bin/env bash
# Usage: launch/virtual_cluster.sh HOSTS RATE -- ARGUMENTS…
#
# Runs torchrun on HOSTS virtual hosts of this machine: network namespaces joined by a bridge, each link limited to RATE
# both ways (1gbit, 100mbit, … as tc takes it, or none). ARGUMENTS are what one gives torchrun after its rendezvous
# flags; one process a host unless they say otherwise. Shows the output of host 0. Example:
#
#   launch/virtual_cluster.sh 4 1gbit -- -m lowbit_tools bench all-reduce --tokens 1024
#
# Needs root and iproute2 (ip, tc). Everything it makes is removed when it ends, also after a failure or Ctrl-C.
# BURST_KB (default: what the link carries in 1 ms, at least 64) is how much may pass at full speed after a pause.
set -euo pipefail

fail() {
    echo "virtual_cluster.sh: error: $*" >&2
    exit 2
}

[[ $# -ge 4 && $3 == "--" ]] || fail "usage: launch/virtual_cluster.sh HOSTS RATE -- ARGUMENTS… (see the first lines of this file)"
hosts=$1 rate=$2
shift 3
[[ $hosts =~ ^[0-9]+$ && $hosts -ge 2 && $hosts -le 64 ]] || fail "HOSTS is '$hosts'; give a number from 2 to 64"
[[ $rate == none || $rate =~ ^([0-9]+)(kbit|mbit|gbit)$ ]] || fail "RATE is '$rate'; give none, or for example 100mbit or 10gbit"
for tool in ip tc; do
    command -v "$tool" >/dev/null || fail "$tool is missing; install iproute2 (Debian: apt-get install iproute2)"
done
[[ $(id -u) -eq 0 ]] || fail "network namespaces need root; run this with sudo"

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

burst_kb=0
if [[ $rate != none ]]; then
    case ${BASH_REMATCH[2]} in kbit) scale=1 ;; mbit) scale=1000 ;; *) scale=1000000 ;; esac
    burst_kb=$((BASH_REMATCH[1] * scale / 8000)) # kilobytes in a millisecond
    burst_kb=${BURST_KB:-$((burst_kb > 64 ? burst_kb : 64))}
fi

name="mlb$$"
network=10.77.0
logs=$(mktemp -d)
children=()

remove_all() {
    trap - EXIT INT TERM
    for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
    for space in $(ip netns list | awk -v prefix="$name-" 'index($1, prefix) == 1 {print $1}'); do
        ip netns pids "$space" | xargs -r kill -9 2>/dev/null || true
        ip netns delete "$space" || true
    done
    rm -rf "$logs"
}
trap remove_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

limit() { # NAMESPACE DEVICE
    [[ $rate == none ]] || ip netns exec "$1" tc qdisc add dev "$2" root tbf rate "$rate" burst "${burst_kb}kb" latency 200ms
}

switch="$name-switch"
ip netns add "$switch"
ip -n "$switch" link add bridge type bridge
ip -n "$switch" link set bridge up
for ((host = 0; host < hosts; host++)); do
    space="$name-host$host"
    ip netns add "$space"
    ip -n "$space" link set lo up
    ip -n "$space" link add eth0 type veth peer name "port$host" netns "$switch"
    ip -n "$space" address add "$network.$((host + 1))/24" dev eth0
    ip -n "$space" link set eth0 up
    ip -n "$switch" link set "port$host" master bridge up
    limit "$space" eth0
    limit "$switch" "port$host"
done
if [[ $rate == none ]]; then
    echo "virtual cluster: $hosts hosts, links not limited"
else
    echo "virtual cluster: $hosts hosts, $rate each way a host, burst $burst_kb kB"
fi

ip netns exec "$name-host0" python -m lowbit_tools.link_probe serve "$network.1" &
children+=($!)
ip netns exec "$name-host1" python -m lowbit_tools.link_probe measure "$network.1"
wait "${children[0]}"
children=()

export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
for ((host = hosts - 1; host >= 0; host--)); do
    command=(ip netns exec "$name-host$host" python -m torch.distributed.run
        --nnodes "$hosts" --node-rank "$host" --nproc-per-node 1 --local-addr "$network.$((host + 1))"
        --master-addr "$network.1" --master-port 29500 "$@")
    if [[ $host -eq 0 ]]; then
        status=0
        "${command[@]}" &
        children+=($!)
        wait $! || status=$?
    else
        "${command[@]}" >"$logs/host$host" 2>&1 &
        children+=($!)
    fi
done
for ((index = 0; index < hosts - 1; index++)); do
    wait "${children[$index]}" || { [[ $status -ne 0 ]] || status=1; }
done
if [[ $status -ne 0 ]]; then
    for ((host = 1; host < hosts; host++)); do
        [[ ! -s "$logs/host$host" ]] || { echo "== host $host said last:" && tail -n 5 "$logs/host$host"; } >&2
    done
fi
exit "$status"
