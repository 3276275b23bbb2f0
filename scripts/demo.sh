#!/usr/bin/env bash
# The tour: a cluster on this machine, a service with a secret, and what happens when machines and programs die.
# Every command is printed before it runs. BULKHEAD_BIN: the folder of the programs. KEEP=1 leaves the cluster up.
set -euo pipefail

bin=$(cd "${BULKHEAD_BIN:-target/release}" && pwd)
subnet=${DEMO_SUBNET:-127.77.0}
fail() { printf 'demo: %s\n' "$*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "workers set up namespaces and control groups, so the tour needs root: sudo make demo"
command -v curl >/dev/null || fail "curl is missing: apt-get install -y curl"

work=$(mktemp -d "${TMPDIR:-/tmp}/bulkhead-demo.XXXXXX")
chmod 711 "$work" # every node's user must be able to pass it
export PATH="$bin:$PATH" XDG_CONFIG_HOME="$work/config" BULKHEAD_DEV_DIR="$work/dev"
unset BULKHEAD_CONTEXT BULKHEAD_SOCKET

say() { printf '\n== %s\n' "$*"; }
run() { printf '\n$ %s\n' "$*"; "$@"; }
# Repeats a command until it succeeds or the seconds are over.
within() {
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "this did not come true in time: $*"
        sleep 0.1
    done
}
cleanup() {
    local code=$?
    trap - EXIT
    if [ "${KEEP:-0}" = 1 ] && [ $code = 0 ]; then
        printf '\nThe cluster stays up. To use it:\n'
        printf '  export PATH=%q:$PATH XDG_CONFIG_HOME=%q BULKHEAD_DEV_DIR=%q\n' "$bin" "$XDG_CONFIG_HOME" "$BULKHEAD_DEV_DIR"
        printf 'To end it: bulkhead dev down; rm -r %q\n' "$work"
        exit 0
    fi
    if [ $code != 0 ] && [ -d "$work/dev" ]; then
        for node in $(bulkhead dev status -q); do
            printf '\n-- last lines of %s\n' "$node" >&2
            bulkhead dev logs -n 12 "$node" >&2 || true
        done
    fi
    if [ -d "$work/dev" ] && ! bulkhead dev down && [ $code = 0 ]; then code=1; fi
    rm -rf "$work"
    exit $code
}
trap cleanup EXIT

say "Three managers and two workers: each a program, a user, a control group and an address of its own"
run bulkhead dev up --managers 3 --workers 2 --subnet "$subnet"
run bulkhead cluster status
run bulkhead node ls

say "An image: one static program and nothing else"
run bulkhead image pack "$bin/bulkhead-probe" -t web:1 --entrypoint /bin/bulkhead-probe --entrypoint serve
run bulkhead image ls

say "A secret: sealed before it reaches the log, and sent only to nodes whose tasks need it"
printf '\n$ echo … | bulkhead secret create db-password -\n'
printf 'correct horse battery staple' | bulkhead secret create db-password -
run bulkhead secret ls

say "A service"
run bulkhead service create --name web --replicas 3 --secret db-password --publish 8080:80 web:1
run bulkhead service ls
run bulkhead service ps web
for worker in 4 5; do
    within 10 curl -sf --max-time 2 "http://$subnet.$worker:8080/health"
    run curl -s --max-time 5 "http://$subnet.$worker:8080/"
done
run curl -s --max-time 5 "http://$subnet.4:8080/secret/db-password"
echo
run bulkhead service logs --tail 2 web

say "The leader's machine dies: the next write waits for an election, and no task notices"
running() { bulkhead service ps web --filter state=running -q | sort; }
before=$(running)
printf '\n$ bulkhead dev kill leader\n'
killed=$(bulkhead dev kill leader)
echo "$killed"
printf '\n$ echo … | bulkhead secret create written-after -\n'
printf 'x' | bulkhead secret create written-after -
after=$(running)
[ "$after" = "$before" ] || fail "tasks changed although only a manager died; before:" $before "after:" $after
run bulkhead dev start "$killed"
voting() { [ "$(bulkhead dev status --filter state=ready --filter role=manager -q | wc -l)" = 3 ]; }
within 15 voting
run bulkhead cluster status

say "A worker's machine dies: its replicas run on the other one"
run bulkhead dev kill worker-1
elsewhere() { [ "$(bulkhead service ps web --filter state=running --filter node=worker-2 -q | wc -l)" = 3 ]; }
within 20 elsewhere
run bulkhead service ps web
run bulkhead dev start worker-1
ready() { [ "$(bulkhead node ls --filter role=worker --filter state=ready -q | wc -l)" = 2 ]; }
within 15 ready

say "A worker's program crashes: its tasks run on, and are adopted"
before=$(running)
run bulkhead dev kill --agent-only worker-2
within 15 ready
after=$(running)
[ "$after" = "$before" ] || fail "tasks changed although only the agent died; before:" $before "after:" $after
run bulkhead dev status

say "An update replaces one replica at a time"
run bulkhead service update web --env-add GREETING=hello --replicas 4
run bulkhead service ls

say "What fits nowhere is refused with the reason, for each node"
printf '\n$ bulkhead service create --name big --reserve-memory 900g web:1\n'
code=0; bulkhead service create --name big --reserve-memory 900g web:1 || code=$?
[ "$code" = 7 ] || fail "the exit code was $code instead of 7"
echo "(exit code $code)"
run bulkhead service rm big

if command -v openssl >/dev/null; then
    say "Everything that crosses a wire is TLS 1.3"
    printf '\n$ openssl s_client -alpn h2 -connect %s\n' "$subnet.1:7443"
    # It ends with an error: it has no root to check the chain against.
    seen=$(openssl s_client -alpn h2 -connect "$subnet.1:7443" </dev/null 2>/dev/null || true)
    grep -E 'New, TLS|^subject=' <<<"$seen" || fail "no handshake"
    if openssl s_client -alpn h2 -connect "$subnet.1:7443" -tls1_2 </dev/null >/dev/null 2>&1; then fail "TLS 1.2 was accepted"; fi
    echo "TLS 1.2: refused"
fi

say "Everything ends"
if [ "${KEEP:-0}" != 1 ]; then
    run bulkhead service rm web
    run bulkhead dev down
fi
printf '\nThe tour is over.\n'
