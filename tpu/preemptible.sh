#!/usr/bin/env bash
# Run a sweep on nodes that may be taken away, until every share is done; see tpu/README.md.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

here=$(cd "$(dirname "$0")" && pwd)
usage="usage: preemptible.sh --zone ZONE --bucket URL [options] [-- options of jaxtta sweep]

For each node: looks at its state, creates it if it is gone or was preempted, sets it up, runs its
share of the sweep, and does so again until the share is done. What is in the bucket is not computed
again. Ctrl-C stops this script alone; run it again to go on.

options: those of run_tpu.sh (--nodes, --name, --type, --spot, --dry-run, ...) and
  --wait SECONDS   between two looks at a node that is not ready, or after an error (default: 60)
  --tries N        give a share up after so many errors in a row on a node that is there (default: 3)"

zone='' name=jaxtta nodes=1 wait=60 tries=3 passed=()
while (($#)); do
    case $1 in
        --wait | --tries)
            [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 needs a number"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --zone | --name | --nodes)
            (($# > 1)) || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            passed+=("$1" "$2")
            shift 2
            ;;
        --node) fail "--node: this script looks after all nodes" ;;
        --dry-run) dry=1 && passed+=("$1") && shift ;;
        -h | --help) echo "$usage" && exit ;;
        --) break ;;
        *) passed+=("$1") && shift ;;
    esac
done
[[ -n $zone ]] || fail "--zone is missing, such as --zone us-west4-a"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes is '$nodes', expected a number from 1"
sweep=("$@")
((dry)) || hash gcloud 2>/dev/null || fail "gcloud is missing: install the Google Cloud CLI"

say() { echo "$(date +%H:%M:%S) $name-$1: $2"; }

tpu() {
    local command=$1 node=$2
    "$here/run_tpu.sh" "$command" --node "$node" ${passed[@]+"${passed[@]}"} \
        ${sweep[@]+"${sweep[@]}"}
}

# The state of a node or queued resource; GONE if there is none, UNKNOWN if gcloud cannot say.
state_of() {
    local said
    if said=$(gcloud compute tpus "$@" --zone "$zone" 2>&1) &&
        grep -xE '[A-Z_]+' <<< "$said" | tail -n 1; then # beside warnings
        return
    elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then
        echo GONE
    else
        echo "$said" >&2
        echo UNKNOWN
    fi
}

# What is to be done with a node: run, create, recreate or wait.
todo() {
    local node queued
    node=$(state_of tpu-vm describe "$name-$1" --format 'value(state)')
    case $node in
        READY) echo run && return ;;
        GONE | PREEMPTED | TERMINATED | STOPPED) ;;
        *) echo wait && return ;;
    esac
    queued=$(state_of queued-resources describe "$name-$1" --format 'value(state.state)')
    case $queued in
        GONE) [[ $node == GONE ]] && echo create || echo recreate ;;
        ACTIVE | SUSPENDED | FAILED) echo recreate ;;
        *) echo wait ;;
    esac
}

keep() {
    local node=$1 errors=0 what began
    while ((errors < tries)); do
        what=$(todo "$node")
        say "$node" "$what"
        case $what in
            run)
                began=$SECONDS
                if tpu setup "$node" && tpu run "$node"; then
                    say "$node" "share done"
                    return
                fi
                ((SECONDS - began < 600)) || errors=0 # a connection may be lost now and then
                # Not an error if it was preempted.
                [[ $(todo "$node") != run ]] || errors=$((errors + 1))
                ;;
            create | recreate)
                [[ $what == create ]] || tpu delete "$node" || true
                if tpu create "$node"; then errors=0; else errors=$((errors + 1)); fi
                ;;
        esac
        sleep "$wait"
    done
    say "$node" "given up after $tries errors in a row"
    return 1
}

"$here/run_tpu.sh" run ${passed[@]+"${passed[@]}"} --dry-run > /dev/null  # are the options right?
if ((dry)); then
    for ((node = 0; node < nodes; node++)); do
        for command in create setup run; do tpu "$command" "$node"; done
    done
    exit
fi
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM
failed=0 pids=()
for ((node = 0; node < nodes; node++)); do
    keep "$node" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
((failed)) && exit 1
echo "all shares are done; next: run_tpu.sh collect, then run_tpu.sh delete"
