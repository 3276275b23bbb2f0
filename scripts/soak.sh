#!/usr/bin/env bash
# soak.sh CHAOS HOURS: campaigns on clusters of real programs, one after the other, until the hours are over or a rule breaks.
# BULKHEAD_BIN: the folder of the programs. REPORT: where reports go. FROM: the first seed. LENGTH: minutes of each campaign.
set -euo pipefail

chaos=$1 hours=$2
bin=${BULKHEAD_BIN:-target/release} report=${REPORT:-soak-report} seed=${FROM:-1} length=${LENGTH:-20}
plans=(mixed rotation mixed partition mixed leader quorum)
[ "$(id -u)" = 0 ] || { echo "soak: clusters of real programs need root" >&2; exit 3; }
seconds=$(awk "BEGIN { print int($hours * 3600) }")
mkdir -p "$report"
while [ "$SECONDS" -lt "$seconds" ]; do
    plan=${plans[$(((seed - 1) % ${#plans[@]}))]}
    left=$(awk "BEGIN { left = ($seconds - $SECONDS) / 60; print left < 1 ? 1 : (left < $length ? left : $length) }")
    printf '== seed %s, %s, %s minutes\n' "$seed" "$plan" "$left"
    "$chaos" live --bin "$bin" --plan "$plan" --minutes "$left" --seed "$seed" --report "$report/$seed" | tail -n 3
    seed=$((seed + 1))
done
