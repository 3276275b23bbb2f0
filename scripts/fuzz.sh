#!/usr/bin/env bash
# fuzz.sh SECONDS: drives each parser of bytes from outside by coverage for so long; ONLY=ticket,csr: these alone.
# What is found is kept in target/fuzz/findings, and what covers most in target/fuzz/corpus, for the next run.
set -euo pipefail

seconds=$1
cd "$(dirname "$0")/.."
folder=${CARGO_TARGET_DIR:-target}/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
command -v c++ >/dev/null || { echo "fuzz: needs a C++ compiler: apt-get install -y g++" >&2; exit 3; }
# What `cargo fuzz build --sanitizer none` sets; it works on stable Rust. Not static: libFuzzer's own runtime is not.
passes="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
passes="$passes -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
RUSTFLAGS="$passes -L native=${LIBSECCOMP_LIB_PATH:-/usr/lib/$(gcc -print-multiarch)}" CARGO_PROFILE_DEV_OPT_LEVEL=1 \
    CARGO_PROFILE_DEV_DEBUG=line-tables-only CARGO_PROFILE_DEV_INCREMENTAL=false \
    cargo build --locked -p bulkhead-fuzz --features libfuzzer --target "$host" --target-dir "$folder"
program=$folder/$host/debug/bulkhead-fuzz
mkdir -p "$folder/findings"
names=${ONLY:-$("$program" --names)}
failed=()
for name in ${names//,/ }; do
    corpus=$folder/corpus/$name
    mkdir -p "$corpus"
    FUZZ_TARGET=$name "$program" --seeds "$corpus"
    if ! FUZZ_TARGET=$name "$program" "$corpus" -max_total_time="$seconds" -timeout=5 -rss_limit_mb=1024 -max_len=65536 \
        -artifact_prefix="$folder/findings/$name-" -print_final_stats=1 >"$folder/$name.log" 2>&1; then
        failed+=("$name")
    fi
    printf '%-18s %s\n' "$name" "$(awk '/stat::number_of_executed_units/ {n=$2} /cov: / {c=$0; sub(/.*cov: /, "", c); sub(/ .*/, "", c)} \
        /stat::peak_rss_mb/ {m=$2} END {printf "%s runs, %s edges covered, %s MiB", n, c, m}' "$folder/$name.log")"
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "found something: ${failed[*]}; see $folder/NAME.log and $folder/findings" >&2
    exit 1
fi
