#!/usr/bin/env bash
# Finds an etcd for `make bench` to measure beside us, and prints its path: the one in PATH, or else Debian's package,
# unpacked into the folder $1. It is not installed, since that would also start it as a service. Without one the
# benchmark goes on and says in its table what is missing.
set -u

folder=$1
command -v etcd && exit 0
program=$folder/usr/bin/etcd
[ -x "$program" ] && { echo "$program"; exit 0; }

fetch() (
    set -e
    mkdir -p "$folder"
    cd "$folder"
    apt-get download -qq etcd-server
    dpkg-deb -x etcd-server_*.deb .
)
if command -v apt-get >/dev/null; then
    # The package index is fetched only where the download fails without it, which only root can do.
    fetch >/dev/null 2>&1 || { [ "$(id -u)" = 0 ] && apt-get update -qq && fetch; } >/dev/null 2>&1
fi
if [ -x "$program" ]; then
    echo "$program"
else
    echo "bench: no etcd here; as root: apt-get update && apt-get install -y etcd-server" >&2
fi
