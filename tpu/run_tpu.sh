#!/usr/bin/env bash
# Create, set up, run, watch, collect and delete: a sweep over N TPU nodes; see tpu/README.md.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

usage="usage: run_tpu.sh COMMAND --zone ZONE [options] [-- options of jaxtta sweep]

commands
  create    ask for the nodes; each waits in the queue by itself
  setup     copy this checkout to the nodes and install it; prints the chips that JAX sees
  run       run each node's share of the sweep, and wait for all; again to resume
  watch     show each node's state and progress, and the results in the bucket
  collect   write the report of all shares on node 0, and download the results
  delete    delete the nodes; the bucket stays

options
  --zone ZONE        where the nodes are, such as us-west4-a
  --bucket URL       gs://BUCKET or a folder in it: data in URL/data, results in URL/results
  --data URL         the data, if it lies elsewhere
  --name NAME        of the nodes: NAME-0, NAME-1, ... (default: jaxtta)
  --nodes N          number of nodes (default: 1)
  --node I           only this one of them
  --type TYPE        of a node; it must have one host (default: v5litepod-8)
  --runtime VERSION  software version of the node (default: that of the type)
  --spot             cheaper nodes that may be taken away; see preemptible.sh
  --precision P      of float32 products, such as highest (default: one bfloat16 pass)
  --output FOLDER    where collect puts the results (default: results)
  --dry-run          print every command and run none"

tpus() { try gcloud compute tpus "$@" --zone "$zone"; }

ssh_() {
    tpus tpu-vm ssh "$name-$1" --quiet --ssh-flag='-o ServerAliveInterval=60' --command "$2"
}

create() {
    local more=()
    ((spot)) && more=(--spot)
    tpus queued-resources create "$name-$1" --node-id "$name-$1" --accelerator-type "$type" \
        --runtime-version "$runtime" ${more[@]+"${more[@]}"}
}

setup() {
    tpus tpu-vm scp --quiet "$archive" "$name-$1:jaxtta.tar.gz"
    # Not while a sweep runs. Nodes have Python 3.10, too old; uv fetches a newer one.
    ssh_ "$1" "set -e; exec 9> sweep.lock; flock 9
mkdir -p jaxtta; tar -xzf jaxtta.tar.gz -C jaxtta; cd jaxtta
python3 -m pip install --quiet --user uv
test -e .venv/bin/pip || { rm -rf .venv; ~/.local/bin/uv venv --quiet --seed --python 3.11 .venv; }
.venv/bin/python -m pip install --quiet -c constraints/common.txt -c constraints/transformers5.txt '.[experiments,tpu]'
.venv/bin/python -c 'import jax; print(jax.devices()); jax.devices(\"tpu\")'"
}

# One sweep at a time on a node: a second one waits for the first, whose connection may be lost.
on_node() {
    local node=$1
    shift
    ssh_ "$node" "cd jaxtta || exit; PATH=\$PWD/.venv/bin:\$PATH flock ../sweep.lock $(line "$@") >> ../sweep.log 2>&1 || { tail -n 20 ../sweep.log; exit 1; }"
}

run() {
    on_node "$1" bash tpu/sweep_imagenet_c.sh "${place[@]}" --shard "$1/$nodes" \
        -- ${sweep[@]+"${sweep[@]}"}
}

watch() {
    local state
    state=$(tpus queued-resources describe "$name-$1" --format 'value(state.state)') || state="not there"
    if ((dry)); then echo "$state"; else echo "$name-$1 is $state"; fi
    if ((dry)) || [[ $state == ACTIVE ]]; then
        ssh_ "$1" "test ! -e sweep.log || tail -c 2000 sweep.log | tr '\\r' '\\n' | tail -n 3" || true
    fi
}

delete() { tpus queued-resources delete "$name-$1" --force --quiet; }

# Do it for all nodes at once; fail if one fails.
each() {
    local node pid pids=() failed=0
    for node in "${chosen[@]}"; do
        if ((dry)) || [[ $1 == watch ]]; then
            "$1" "$node"
        else
            "$1" "$node" &
            pids+=($!)
        fi
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        wait "$pid" || failed=1
    done
    return "$failed"
}

command=${1:-}
case $command in
    create | setup | run | watch | collect | delete) shift ;;
    -h | --help) echo "$usage" && exit ;;
    *) fail "expected a command, create, setup, run, watch, collect or delete, not '$command'" ;;
esac

zone='' bucket='' data='' name=jaxtta nodes=1 node='' type=v5litepod-8 runtime='' output=results
precision='' spot=0 sweep=()
while (($#)); do
    case $1 in
        --zone | --bucket | --data | --name | --nodes | --node | --type | --runtime | --output | \
            --precision)
            (($# > 1)) || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --spot) spot=1 && shift ;;
        --dry-run) dry=1 && shift ;;
        -h | --help) echo "$usage" && exit ;;
        --) shift && sweep=("$@") && break ;;
        *) fail "unknown option '$1'; options of jaxtta sweep come after --" ;;
    esac
done
bucket=${bucket%/}
place=(--bucket "$bucket" --data "${data:-$bucket/data}")
[[ -z $precision ]] || place+=(--precision "$precision")

[[ -n $zone ]] || fail "--zone is missing, such as --zone us-west4-a"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes is '$nodes', expected a number from 1"
if [[ -n $node ]]; then
    if ! [[ $node =~ ^(0|[1-9][0-9]*)$ ]] || ((node >= nodes)); then
        fail "--node is '$node', expected 0 to $((nodes - 1))"
    fi
    chosen=("$node")
else
    chosen=()
    for ((i = 0; i < nodes; i++)); do chosen+=("$i"); done
fi
case $type in
    v5litepod-[148]) usual=v2-alpha-tpuv5-lite ;;
    v6e-[148]) usual=v2-alpha-tpuv6e ;;
    v4-8) usual=tpu-ubuntu2204-base ;;
    *) fail "--type is '$type', expected one with one host: v5litepod-8, v6e-8 or v4-8 (and more --nodes)" ;;
esac
runtime=${runtime:-$usual}
case $command in
    run | watch | collect) [[ $bucket == gs://* ]] || fail "--bucket is '$bucket', expected gs://..." ;;
esac
((dry)) || hash gcloud 2>/dev/null || fail "gcloud is missing: install the Google Cloud CLI"
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM

case $command in
    setup)
        root=$(cd "$(dirname "$0")/.." && pwd)
        archive=jaxtta.tar.gz
        if ((!dry)); then
            archive=$(mktemp -d)/jaxtta.tar.gz
            trap 'rm -r "$(dirname "$archive")"' EXIT
        fi
        try tar --exclude __pycache__ -czf "$archive" -C "$root" jaxtta tpu benchmarks constraints \
            pyproject.toml README.md LICENSE
        each setup
        ;;
    watch)
        each watch
        ((dry)) || echo "results in the bucket, one for each adapter and stream:"
        try gcloud storage ls "$bucket/results/predictions/" || echo "none yet"
        ;;
    collect)
        on_node 0 bash tpu/sweep_imagenet_c.sh "${place[@]}" -- ${sweep[@]+"${sweep[@]}"}
        ((dry)) || mkdir -p "$output"
        try gcloud storage rsync --recursive "$bucket/results" "$output"
        ;;
    delete)
        failed=0
        each delete || failed=1 # such as one that is not there; the rest is shown all the same
        tpus queued-resources list
        exit "$failed"
        ;;
    *) each "$command" ;;
esac
