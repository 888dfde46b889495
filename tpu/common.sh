# shellcheck shell=bash
# What the scripts of this folder share.

dry=0 # 1 with --dry-run

fail() {
    echo "error: $*" >&2
    exit 2
}

# A command line as one would type it.
line() {
    local word quoted=() quote="'" escaped="'\\''" # named, since older bashes keep escapes
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
            quoted+=("$word")
        else
            quoted+=("'${word//$quote/$escaped}'")
        fi
    done
    echo "${quoted[*]}"
}

# Run a command, or with --dry-run print it.
try() {
    if ((dry)); then
        line "$@"
    else
        "$@"
    fi
}
