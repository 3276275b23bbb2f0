#!/usr/bin/env bash
# The compose cluster, tried whole: it comes up, runs a service with a secret, loses its leader and a worker's network, is
# stopped and started, and leaves nothing behind. BULKHEAD_BIN: the folder of the programs. HEALTHY_WITHIN: the seconds
# that the first start may take, for a machine that is busy with other things.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { printf 'compose-test: %s\n' "$*" >&2; exit 1; }
needs() { command -v "$1" >/dev/null || fail "no $1: install it, on Debian with: apt-get install -y $2"; }
needs docker docker.io
needs docker-compose docker-compose
needs curl curl
docker version >/dev/null 2>&1 || fail "docker does not answer: start it with: systemctl start docker"
[ "$(id -u)" = 0 ] || fail "it looks into processes and volumes of the containers, so it needs root: sudo make compose-test"

HEALTHY_WITHIN=${HEALTHY_WITHIN:-30}
project=bulkhead-test-$$
export COMPOSE_PROJECT_NAME=$project COMPOSE_FILE=$here/docker-compose.yml BULKHEAD_IMAGE=localhost/bulkhead-test:$$
managers=(manager-1 manager-2 manager-3)
workers=(worker-1 worker-2)
work=$(mktemp -d)
declare -A id

say() { printf '\n== %s\n' "$*"; }
ok() { printf 'ok: %s\n' "$*"; }
now() { printf '%s' "${EPOCHREALTIME/[.,]/}"; } # microseconds
since() { local took=$((($(now) - $1) / 10000)); printf '%d.%02d s' $((took / 100)) $((took % 100)); }
# Repeats a command until it succeeds or the seconds are over.
within() {
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "this did not come true in time: $*"
        sleep 0.2
    done
}
compose() { docker-compose "$@" 2>>"$work/compose.log" || fail "docker-compose $*: $(tail -n 3 "$work/compose.log")"; }
# `bulkhead` as the operator, as the file's header tells; and through a manager's own socket, which is quicker.
lab() { compose run --rm -T cli "$@"; }
ask() { docker exec -i "${id[$1]}" bulkhead "${@:2}"; }
healthy() { # services
    local ids=() service
    for service in "$@"; do ids+=("${id[$service]}"); done
    [ "$(docker inspect -f '{{.State.Health.Status}}' "${ids[@]}" | sort -u)" = healthy ]
}
container() { docker ps -aq --no-trunc --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"; }
address() { docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "${id[$1]}"; }
pid_of() { docker inspect -f '{{.State.Pid}}' "${id[$1]}"; }
status() { sed -n "s/^$2:[[:space:]]*//p" "/proc/$1/status"; }
leftovers() {
    docker ps -aq --filter "label=com.docker.compose.project=$project"
    docker network ls -q --filter "label=com.docker.compose.project=$project"
    docker volume ls -q --filter "label=com.docker.compose.project=$project"
    for container in "${id[@]}"; do find /sys/fs/cgroup -type d -path "*$container*"; done
}
cleanup() {
    local code=$?
    trap - EXIT
    if [ "$code" != 0 ]; then docker-compose logs --no-color --tail 15 >&2 2>/dev/null || true; fi
    docker-compose down -v --remove-orphans -t 2 >/dev/null 2>&1 || true
    docker rmi "$BULKHEAD_IMAGE" >/dev/null 2>&1 || true
    rm -rf "$work"
    exit "$code"
}
trap cleanup EXIT

say "Three managers and two workers come up with one command"
bash "$here/build.sh"
started=$(now) before=$SECONDS
compose up -d
for service in "${managers[@]}" "${workers[@]}" init; do id[$service]=$(container "$service"); done
within $((HEALTHY_WITHIN - SECONDS + before)) healthy "${managers[@]}" "${workers[@]}"
ok "five are healthy $(since "$started") after 'up'"
[ "$(docker wait "${id[init]}")" = 0 ] || fail "the one-shot 'init' failed"
lab node ls

say "A service with a secret answers on both workers"
value=$(head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
lab image pack /bin/bulkhead-probe -t web:1 --entrypoint /bin/bulkhead-probe --entrypoint serve
printf %s "$value" | lab secret create db-password -
lab service create --name web --replicas 4 --secret db-password --publish 80:80 web:1
lab service ps web
for worker in "${workers[@]}"; do
    within 10 curl -sf --max-time 2 "http://$(address "$worker")/health"
    got=$(curl -s --max-time 5 "http://$(address "$worker")/secret/db-password")
    [ "$got" = "$value" ] || fail "the task on $worker has another secret than was made"
    ok "$worker: $(curl -s --max-time 5 "http://$(address "$worker")/")"
done
limit=$(cat $(find /sys/fs/cgroup -path "*${id[worker-1]}*/bulkhead-*/*/*" \( -name memory.limit_in_bytes -o -name memory.max \)) | sort -u)
[ "$limit" = 268435456 ] || fail "the tasks' memory limit is '$limit', not the default of 256 MiB"
ok "the memory limit of the tasks is in force"
task_users() { # the users of a worker's tasks, as this machine counts them
    local supervisor
    for supervisor in $(pgrep -P "$(pid_of "$1")" -f ^bulkhead-supervisor); do status "$(pgrep -P "$supervisor")" Uid | cut -f1; done
}
users=$(for worker in "${workers[@]}"; do task_users "$worker"; done | sort -u)
[ "$(awk '$1 >= 1879048192' <<<"$users" | wc -l)" = 4 ] || fail "the four tasks are not four users of the tasks' range: $users"
ok "each task has a user of its own on this machine"

say "The leader is killed"
running() { ask "$1" service ps web --filter state=running -q | sort; }
leader=
for manager in "${managers[@]}"; do
    if ask manager-1 node ls --filter "name=$manager" | grep -q ' leader '; then leader=$manager; fi
done
[ -n "$leader" ] || fail "no leader is known"
others=("${managers[@]/$leader}"); others=(${others[@]})
before=$(running "${others[0]}")
[ "$(wc -w <<<"$before")" = 4 ] || fail "not all of the 4 replicas run"
killed=$(now)
docker kill -s KILL "${id[$leader]}" >/dev/null
printf x | ask "${others[0]}" secret create written-after - >/dev/null
ok "a write succeeded $(since "$killed") after the kill of $leader"
[ "$(running "${others[0]}")" = "$before" ] || fail "a task was replaced although only a manager died"
ok "no task was replaced"
docker start "${id[$leader]}" >/dev/null
within 30 healthy "${managers[@]}"
ask "$leader" secret ls | grep -q written-after || fail "$leader came back without what was written meanwhile"
ok "$leader is back"

say "A worker loses its network"
on() { [ "$(ask manager-1 service ps web --filter state=running --filter "node=$1" -q | wc -l)" = "$2" ]; }
ready() { ask manager-1 node ls --filter "name=$1" | grep -q ' ready '; }
groups() { find /sys/fs/cgroup -path "*${id[$1]}*" -path '*/bulkhead-*/*' -type d | grep .; }
none() { ! groups "$1"; }
groups worker-1 >/dev/null || fail "no control groups of tasks are found on worker-1"
lost=$(now)
docker network disconnect "${project}_default" "${id[worker-1]}"
within 30 on worker-2 4
ok "its replicas run on the other one after $(since "$lost")"
docker network connect "${project}_default" "${id[worker-1]}"
back=$(now)
within 30 ready worker-1
within 30 healthy worker-1
ok "it is ready again $(since "$back") after its network"
within 30 none worker-1
ok "it stopped its old copies"

say "What the programs may"
must() { [ "$2" = "$3" ] || fail "$1 is '$2', not '$3'"; }
nothing=0000000000000000
for service in "${managers[@]}" "${workers[@]}"; do
    pid=$(pid_of "$service")
    must "$service: no_new_privs" "$(status "$pid" NoNewPrivs)" 1
    awk '$5 == "/" { print $6 }' "/proc/$pid/mountinfo" | grep -qw ro || fail "$service: its root can be written"
    must "$service: privileged" "$(docker inspect -f '{{.HostConfig.Privileged}}' "${id[$service]}")" false
    must "$service: bindings of host folders" "$(docker inspect -f '{{range .Mounts}}{{if eq .Type "bind"}}{{.Source}}{{end}}{{end}}' "${id[$service]}")" ""
done
for manager in "${managers[@]}"; do
    pid=$(pid_of "$manager")
    must "$manager: user" "$(status "$pid" Uid | cut -f1)" 1879047936
    for set in CapInh CapPrm CapEff CapBnd CapAmb; do must "$manager: $set" "$(status "$pid" $set)" $nothing; done
    must "$manager: seccomp" "$(status "$pid" Seccomp)" 2
done
ok "managers: a plain user, no capability in any set, a system call filter, a read-only root"
for worker in "${workers[@]}"; do
    launcher=$(pid_of "$worker")
    must "$worker: the launcher's capabilities" "$(status "$launcher" CapBnd)" 00000000002000c0 # SYS_ADMIN, SETUID, SETGID
    agent=$(pgrep -P "$launcher" -x bulkhead-worker)
    must "$worker: the worker's user" "$(status "$agent" Uid | cut -f1)" 1879047936
    for set in CapInh CapPrm CapEff CapAmb; do must "$worker: the worker's $set" "$(status "$agent" $set)" $nothing; done
    must "$worker: the worker's seccomp" "$(status "$agent" Seccomp)" 2
    must "$worker: the managers' ticket" "$(docker inspect -f '{{range .Mounts}}{{.Name}} {{end}}' "${id[$worker]}" | grep -c manager || true)" 0
done
ok "workers: the launcher has three capabilities, the worker none"
seen=$(curl -s --max-time 5 "http://$(address worker-2)/inspect")
for set in CapInh CapPrm CapEff CapBnd CapAmb; do grep -q "\"$set\":\"$nothing\"" <<<"$seen" || fail "a task has capabilities: $seen"; done
if grep -Eq 'docker|/data/' <<<"$seen"; then fail "a task sees a part of its node: $seen"; fi
ok "tasks: no capability in any set, nothing of the container in sight"

say "The secret is in no log and on no disk"
hex() { od -An -v -tx1 | tr -d ' \n'; }
forms() { # raw, hexadecimal, base64 at each of the three alignments without the ends that depend on the neighbours
    printf '%s\n' "$value"
    printf %s "$value" | hex; echo
    printf %s "$value" | hex | tr a-f A-F; echo
    for skip in 0 1 2; do printf %s "${value:$skip}" | head -c 45 | base64 -w 0; echo; done
}
forms >"$work/forms"
while read -r form; do
    grep -qFaf "$work/forms" <<<"before${form}after" || fail "the search would not find the value as $form"
done <"$work/forms"
printf %s "xy$value" | base64 -w 0 | grep -qFaf "$work/forms" || fail "the search would not find the value inside of base64"
for service in "${!id[@]}"; do
    if docker logs "${id[$service]}" 2>&1 | grep -qFaf "$work/forms"; then fail "the secret is in the log of $service"; fi
done
volumes=$(docker volume ls -q --filter "label=com.docker.compose.project=$project")
[ "$(wc -w <<<"$volumes")" = 9 ] || fail "these volumes are not the nine that are expected: $volumes"
files=0
for volume in $volumes; do
    folder=$(docker volume inspect -f '{{.Mountpoint}}' "$volume")
    files=$((files + $(find "$folder" -type f | wc -l)))
    if found=$(grep -rlFaf "$work/forms" "$folder"); then fail "the secret is in: $found"; fi
done
[ "$files" -gt 20 ] || fail "only $files files were searched"
ok "$files files of 9 volumes and all logs were searched"

say "It is stopped and started"
stopped=$(now)
compose stop
ok "stopped after $(since "$stopped")"
for service in "${managers[@]}" "${workers[@]}"; do
    must "$service: exit code" "$(docker inspect -f '{{.State.ExitCode}}' "${id[$service]}")" 0
done
ok "all ended by themselves"
started=$(now)
compose up -d
within 30 healthy "${managers[@]}" "${workers[@]}"
ok "five are healthy $(since "$started") after 'up'"
all() { [ "$(running manager-1 | wc -l)" = 4 ]; }
within 60 all
lab secret ls -q >/dev/null
ok "its service runs again $(since "$started") after 'up'"
[ "$(docker wait "${id[init]}")" = 0 ] || fail "the one-shot 'init' failed the second time"

say "Nothing is left"
compose down -v
[ -z "$(leftovers)" ] || fail "this is left: $(leftovers)"
docker rmi "$BULKHEAD_IMAGE" >/dev/null
ok "no container, network, volume or control group"
