#!/usr/bin/env bash
# The tour: three managers and two workers on this machine, a service with a secret, and what happens when programs die.
# Every command is printed before it runs. BULKHEAD_BIN: the folder of the programs. KEEP=1 leaves the cluster up.
set -euo pipefail

bin=$(cd "${BULKHEAD_BIN:-target/release}" && pwd)
subnet=${DEMO_SUBNET:-127.77.0}
fail() { printf 'demo: %s\n' "$*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "workers set up namespaces and cgroups, so the tour needs root: sudo make demo"

work=$(mktemp -d "${TMPDIR:-/tmp}/bulkhead-demo.XXXXXX")
chmod 711 "$work"
export PATH="$bin:$PATH" XDG_CONFIG_HOME="$work/config"
unset BULKHEAD_CONTEXT BULKHEAD_SOCKET
declare -A pid

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
gone() { ! kill -0 "$1" 2>/dev/null; }
start_manager() { # number; each manager is a user of its own, without any privilege
    local uid=$((77000 + $1)) data=$work/manager-$1
    mkdir -p "$data"; chown "$uid:$uid" "$data"; chmod 700 "$data"
    setpriv --reuid "$uid" --regid "$uid" --clear-groups -- \
        bulkhead-manager --data "$data" >>"$work/manager-$1.log" 2>&1 &
    pid[manager-$1]=$!
    within 10 test -S "$data/manager.sock"
}
start_worker() { # number, address of its published ports
    bulkhead-launcher --data "$work/worker-$1" -- --publish-address "$2" --name "worker-$1" >>"$work/worker-$1.log" 2>&1 &
    pid[worker-$1]=$!
    within 10 test -S "$work/worker-$1/worker/worker.sock"
}
cleanup() {
    local code=$?
    trap - EXIT
    if [ "${KEEP:-0}" = 1 ] && [ $code = 0 ]; then
        printf '\nThe cluster stays up below %s. Use it with: export XDG_CONFIG_HOME=%s\n' "$work" "$XDG_CONFIG_HOME"
        exit 0
    fi
    if [ $code != 0 ]; then
        for log in "$work"/*.log; do printf '\n-- last lines of %s\n' "${log##*/}" >&2; tail -n 12 "$log" >&2; done
    fi
    for node in "${!pid[@]}"; do kill -CONT "${pid[$node]}" 2>/dev/null || true; kill "${pid[$node]}" 2>/dev/null || true; done
    wait
    # Whatever a failed tour left of its tasks: their supervisors keep the folder open.
    for supervisor in $(pgrep -x bulkhead-superv || true); do
        if ls -l "/proc/$supervisor/fd" 2>/dev/null | grep -q "$work/"; then kill -9 "$supervisor" 2>/dev/null || true; fi
    done
    rm -rf "$work"
    exit $code
}
trap cleanup EXIT

say "Three managers and two workers wait until they are told to make or join a cluster"
for n in 1 2 3; do start_manager $n; done
start_worker 1 "$subnet.4"
start_worker 2 "$subnet.5"
run bulkhead cluster init --socket "$work/manager-1/manager.sock" --listen "$subnet.1:7443" --advertise "$subnet.1:7443" --name manager-1 --lab

say "Tickets let the others in: one for two managers, one for two workers; they expire, and each names its root"
bulkhead cluster ticket create --role manager --uses 2 -q >"$work/manager.ticket"
bulkhead cluster ticket create --role worker --uses 2 -q >"$work/worker.ticket"
for n in 2 3; do
    run bulkhead cluster join --socket "$work/manager-$n/manager.sock" --ticket-file "$work/manager.ticket" \
        --listen "$subnet.$n:7443" --advertise "$subnet.$n:7443" --name "manager-$n" "$subnet.1:7443"
done
for n in 1 2; do
    run bulkhead cluster join --socket "$work/worker-$n/worker/worker.sock" --ticket-file "$work/worker.ticket" "$subnet.1:7443"
done
run bulkhead cluster status
ready() { [ "$(bulkhead node ls --filter role=worker --filter state=ready -q | wc -l)" = 2 ]; }
within 10 ready
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

say "The leader is killed: the next write waits for an election, and no task notices"
running() { bulkhead service ps web --filter state=running -q | sort; }
before=$(running)
leader=
for n in 1 2 3; do
    if bulkhead node ls --filter name=manager-$n | grep -q leader; then leader=$n; fi
done
[ -n "$leader" ] || fail "no leader is known"
run kill -9 "${pid[manager-$leader]}"
printf '\n$ echo … | bulkhead secret create written-after -\n'
printf 'x' | bulkhead secret create written-after -
[ "$(running)" = "$before" ] || fail "a task was replaced although only a manager died"
start_manager "$leader"
healthy() { bulkhead health --socket "$work/manager-$1/manager.sock"; }
within 15 healthy "$leader"
run bulkhead cluster status

say "A worker hangs: its replicas run on the other one"
agent=$(pgrep -P "${pid[worker-1]}" -x bulkhead-worker)
run kill -STOP "$agent"
elsewhere() { [ "$(bulkhead service ps web --filter state=running --filter node=worker-2 -q | wc -l)" = 3 ]; }
within 20 elsewhere
run bulkhead service ps web
run kill -CONT "$agent"
within 15 ready
run bulkhead node ls

say "What fits nowhere is refused with the reason, for each node"
printf '\n$ bulkhead service create --name big --reserve-memory 900g web:1\n'
code=0; bulkhead service create --name big --reserve-memory 900g web:1 || code=$?
[ "$code" = 7 ] || fail "the exit code was $code instead of 7"
echo "(exit code $code)"
run bulkhead service rm big

if command -v openssl >/dev/null; then
    say "Everything that crosses a wire is TLS 1.3"
    printf '\n$ openssl s_client -alpn h2 -connect %s\n' "$subnet.$leader:7443"
    # It ends with an error: it has no root to check the chain against.
    seen=$(openssl s_client -alpn h2 -connect "$subnet.$leader:7443" </dev/null 2>/dev/null || true)
    grep -E 'New, TLS|^subject=' <<<"$seen" || fail "no handshake"
    if openssl s_client -alpn h2 -connect "$subnet.$leader:7443" -tls1_2 </dev/null >/dev/null 2>&1; then fail "TLS 1.2 was accepted"; fi
    echo "TLS 1.2: refused"
fi

say "Everything ends"
if [ "${KEEP:-0}" != 1 ]; then
    run bulkhead service rm web
    no_tasks() { [ -z "$(ls -A "$work/worker-1/launcher/tasks" "$work/worker-2/launcher/tasks" | grep -v :)" ]; }
    within 30 no_tasks
fi
printf '\nThe tour is over.\n'
