#!/usr/bin/env bash
# One host's share of an ImageNet-C sweep, on all of its TPU chips or GPUs; see tpu/README.md.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

usage="usage: sweep_imagenet_c.sh --bucket URL [options] [-- options of jaxtta sweep]

Copies the data to this machine, then runs BATCLIP, TENT and zero-shot CLIP on it. The same command
again goes on where it was.

options
  --bucket URL     gs://BUCKET, a folder in it, or a local folder: data in URL/data, results in
                   URL/results
  --data PLACE     the data, if it lies elsewhere: a gs:// URL, or a folder, which is not copied
  --copy FOLDER    where the data is copied to (default: ~/data/BUCKET/...)
  --shard I/N      this host's share; without it, all, which also writes the report
  --precision P    of float32 products, such as highest (default: one bfloat16 pass)
  --dry-run        print every command and run none"

bucket='' data='' copy='' shard='' precision=''
while (($#)); do
    case $1 in
        --bucket | --data | --copy | --shard | --precision)
            (($# > 1)) || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --dry-run) dry=1 && shift ;;
        -h | --help) echo "$usage" && exit ;;
        --) shift && break ;;
        *) fail "unknown option '$1'; options of jaxtta sweep come after --" ;;
    esac
done
bucket=${bucket%/}
data=${data:-$bucket/data}
[[ -n $bucket ]] || fail "--bucket is missing, such as --bucket gs://BUCKET"
if [[ -n $shard ]]; then
    [[ $shard =~ ^[0-9]+/[0-9]+$ ]] || fail "--shard is '$shard', expected I/N, such as 0/4"
    set -- --shard "$shard" "$@"
fi

if [[ $data == gs://* ]]; then
    copy=${copy:-$HOME/data/${data#gs://}}
    try mkdir -p "$copy"
    try gcloud storage rsync --recursive "$data" "$copy"
    data=$copy
fi
program=(jaxtta)
[[ -z $precision ]] || program=(env "JAX_DEFAULT_MATMUL_PRECISION=$precision" jaxtta)
# An option in "$@" replaces that of the same name: the last one counts.
try "${program[@]}" sweep --layout arrayrecord --data "$data" --output "$bucket/results" \
    --model openai/clip-vit-base-patch16 --adapters zero_shot tent batclip \
    --preset imagenet-c --batch-size 64 --compute-dtype bfloat16 --scan-blocks \
    --devices all --split streams --checkpoint-every 200 --workers "$(nproc)" "$@"
