#!/bin/sh
# Tries the README where a user has it: makes a bare Debian, clones the last commit into it, and runs `make demo` and
# `make test` there as an ordinary user. Needs root, debootstrap and git.
#   sh scripts/fresh.sh                          both suites, both commands
#   sh scripts/fresh.sh trixie 'make demo'       one suite, these commands
# MIRROR=... names a mirror of Debian, TMPDIR=... the folder to work in (4 GB; 8 GB with the CUDA build of torch).
# The mirror and pip's settings of this machine are used otherwise. At the end nothing of it is left.
set -eu

packages=python3,python3-venv,git,make,ca-certificates
repository=$(cd "$(dirname "$0")/.." && pwd)

# Shows a folder or file of this machine at the same path in the new system, read-only.
show() {
    if [ -d "$1" ]; then
        mkdir -p "$root$1"
    else
        mkdir -p "$root$(dirname "$1")"
        [ -e "$root$1" ] || : >"$root$1"
    fi
    mount --bind -o ro "$1" "$root$1"
}

network_variables() {
    env | grep -E '^(PIP_[A-Z_]+|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|([a-z]+_proxy|[A-Z]+_PROXY))=' || true
}

# How this machine reaches a package index: its names of hosts, pip's settings, and the local paths that these name.
connect() {
    for file in /etc/resolv.conf /etc/hosts; do
        [ ! -e "$file" ] || cp -L "$file" "$root$file"
    done
    for settings in /etc/pip.conf /etc/xdg/pip; do
        [ ! -e "$settings" ] || {
            mkdir -p "$root$(dirname $settings)"
            cp -r "$settings" "$root$settings"
        }
    done
    for settings in .config/pip .pip; do
        [ ! -e "$HOME/$settings" ] || {
            mkdir -p "$root$home/$(dirname $settings)"
            cp -r "$HOME/$settings" "$root$home/$settings"
        }
    done
    named=$({
        network_variables
        find "$root/etc/pip.conf" "$root/etc/xdg/pip" "$root$home/.config/pip" "$root$home/.pip" -type f -exec cat {} + 2>/dev/null
    } | grep -v '^ *#' | grep -oE '(^|[ =]|file://)/[^ ,]+' | sed -E 's/^[ =]//' | sort -u)
    for path in $named; do
        case $path in
        # The pages of an index link to files beside it.
        file://*) path=$(dirname "${path#file://}") ;;
        esac
        [ ! -e "$path" ] || [ "$path" = / ] || show "$path"
    done
}

as_user() {
    command=$1
    set --
    network_variables >"$root.variables"
    while IFS= read -r variable; do
        set -- "$@" "$variable"
    done <"$root.variables"
    env -i PATH=/usr/local/bin:/usr/bin:/bin HOME=$home USER=user LANG=C.UTF-8 TERM=dumb "$@" \
        "$(command -v chroot)" --userspec=user:user "$root" sh -c "cd ~/tinkex_py && $command" </dev/null
}

# Runs in namespaces of its own: when it ends, its mounts and processes are gone.
inside() {
    root=$1 suite=$2 home=/home/user
    shift 2
    mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)}
    echo "fresh: $suite with ${packages}, about 3 minutes"
    debootstrap --variant=minbase --include=$packages "$suite" "$root" ${mirror:+"$mirror"} >"$root.log" 2>&1 || {
        tail -n 20 "$root.log"
        exit 1
    }
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    chroot "$root" useradd --create-home user
    connect
    git clone --quiet --no-local "$repository" "$root$home/tinkex_py"
    chroot "$root" chown -R user:user $home
    echo "fresh: $suite has $(chroot "$root" python3 --version), commit $(git -C "$repository" rev-parse --short HEAD)"
    for command in "$@"; do
        echo "fresh: $suite: $command"
        begin=$(date +%s)
        as_user "$command" || { echo "fresh: $suite: FAILED: $command"; exit 1; }
        size=$(du -sm "$root$home/tinkex_py/.venv" | cut -f1)
        echo "fresh: $suite: passed in $(($(date +%s) - begin)) s, .venv has $size MB: $command"
    done
}

case ${1:-} in
--inside)
    shift
    inside "$@"
    exit
    ;;
"")
    sh "$0" bookworm
    exec sh "$0" trixie
    ;;
esac

if [ "$(id -u)" != 0 ]; then
    echo "fresh: chroot needs root: sudo make fresh" >&2
    exit 1
fi
if ! command -v debootstrap >/dev/null; then
    echo "fresh: debootstrap is missing: apt-get install debootstrap" >&2
    exit 1
fi
suite=$1
shift
[ $# -gt 0 ] || set -- "make demo" "make test"
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM
chmod 755 "$work"
mkdir "$work/root"
unshare --mount --pid --fork --kill-child sh "$0" --inside "$work/root" "$suite" "$@"
