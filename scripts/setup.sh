#!/usr/bin/env bash
# Installs what the build needs and a Rust toolchain does not bring: libseccomp's static archive, and a C compiler. With
# `networks` also what makes and cuts the networks of chaos runs: `ip` and `nft`.
set -eu

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

command -v cargo >/dev/null || fail "no cargo: install a stable Rust toolchain with rustup first"

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
archive() {
    [ -n "${LIBSECCOMP_LIB_PATH:-}" ] && [ -e "$LIBSECCOMP_LIB_PATH/libseccomp.a" ] && return 0
    compgen -G '/usr/lib/*/libseccomp.a' >/dev/null || [ -e /usr/lib/libseccomp.a ]
}
archive || missing+=(libseccomp-dev)
if [ "${1:-}" = networks ] && [ "$(id -u)" = 0 ]; then # without root there are no such runs
    PATH=$PATH:/usr/sbin:/sbin
    command -v ip >/dev/null || missing+=(iproute2)
    command -v nft >/dev/null || missing+=(nftables)
fi
[ ${#missing[@]} -eq 0 ] && exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
[ "$(id -u)" = 0 ] || fail "these packages are missing; run as root: $install"
command -v apt-get >/dev/null || fail "no apt-get here; install what Debian calls: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# The package index is fetched only where the install fails without it.
$install >/dev/null 2>&1 || { apt-get update -qq && $install; } >/dev/null || fail "failed: $install"
archive || fail "libseccomp.a is still not found; set LIBSECCOMP_LIB_PATH to its folder"
