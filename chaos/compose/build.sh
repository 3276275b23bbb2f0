#!/usr/bin/env bash
# Makes the image of the compose cluster. BULKHEAD_BIN: the folder of the programs. BULKHEAD_IMAGE: the image's name.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(cd "${BULKHEAD_BIN:-target/release}" && pwd)
image=${BULKHEAD_IMAGE:-localhost/bulkhead}
fail() { printf 'compose-image: %s\n' "$*" >&2; exit 1; }

command -v docker >/dev/null || fail "no docker: install it, on Debian with: apt-get install -y docker.io"
docker version >/dev/null 2>&1 || fail "docker does not answer: start it (systemctl start docker), and be root or in the group docker"

programs=(bulkhead bulkhead-manager bulkhead-worker bulkhead-launcher bulkhead-probe)
for program in "${programs[@]}"; do
    [ -x "$bin/$program" ] || fail "$program is not in $bin: run 'make' first"
done

empty=$(mktemp -d)
trap 'rmdir "$empty/empty" "$empty"' EXIT
mkdir -m 700 "$empty/empty"
# The context goes through a pipe: it holds these files and no others, whatever else lies in their folders.
tar -c -C "$here" Dockerfile -C "$empty" empty -C "$bin" "${programs[@]}" | docker build --quiet --tag "$image" - >/dev/null
# A program that is not static would not start here.
version=$(docker run --rm --network none --read-only --cap-drop ALL "$image" bulkhead version) || fail "the programs do not run in the image"
printf '%s: %s\n' "$image" "$version"
