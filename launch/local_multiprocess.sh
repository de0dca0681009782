#!/usr/bin/env bash
# Runs a command as several processes of one run on this machine, and tells them so by flags:
#   launch/local_multiprocess.sh 2 enat train --config=configs/digits.py --workdir=runs/digits
# Lines begin with the process's number; SIGTERM and Ctrl-C reach all. When one fails, the others
# have GRACE seconds (20) to end by themselves; so have all when this script is killed. The exit
# code is that of the first to fail.
set -um # a process group each, and signals as usual
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]] || ! command -v "$2" > /dev/null; then
    echo "usage: $0 PROCESSES enat VERB --flag=value ..." >&2
    exit 2
fi
processes=$1 code=0 signalled=0 guard='' pids=() && shift
while port=$((20000 + RANDOM % 10000)) && (: < "/dev/tcp/localhost/$port") 2> /dev/null; do :; done
export JAX_COORDINATOR_BIND_ADDRESS=localhost:$port # else it listens to the network, too

tell() { # sends a signal to every group that is still there
    for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2> /dev/null; done
}
trap 'signalled=1; tell TERM' TERM
trap 'signalled=1; tell INT' INT
trap '[[ -z $guard ]] || kill -- "-$guard" 2> /dev/null' EXIT

# reads the processes' ids; the end of its input before "done" is the end of this script
exec {alive}> >(
    trap '' TERM INT
    while read -r pid && [[ $pid != done ]]; do pids+=("$pid"); done
    [[ $pid == done ]] || { tell TERM && sleep "${GRACE:-20}" && tell KILL; } 2> /dev/null
)

mark() { trap '' TERM INT && exec sed -u "s/^/[$1] /"; } # the signals are not for it
for ((k = 0; k < processes; k++)); do
    "$@" "--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$k" \
        > >(exec {alive}>&- && mark "$k") 2> >(exec {alive}>&- && mark "$k" >&2) \
        < /dev/null {alive}>&- &
    pids+=($!) && echo $! >&"$alive"
done
for ((left = processes; left > 0; left--)); do
    wait -n 2> /dev/null
    status=$?
    if ((signalled)); then # the signal ended the wait, no process did
        signalled=0 left=$((left + 1))
    elif ((status && status != 127 && !code)) && code=$status; then
        (exec {alive}>&- && sleep "${GRACE:-20}" && tell KILL) > /dev/null 2>&1 &
        guard=$!
        disown
    fi
done
for pid in "${pids[@]}"; do wait "$pid" || ((code)) || code=$?; done
echo done >&"$alive"
exit "$code"
