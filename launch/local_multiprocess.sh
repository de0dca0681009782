#!/usr/bin/env bash
# Runs a command as several processes of one run on this machine, and tells them so by flags:
#   launch/local_multiprocess.sh 2 enat train --config=configs/digits.py --workdir=runs/digits
# Lines begin with the process's number; SIGTERM and Ctrl-C reach all. When one fails, the others
# have GRACE seconds (20) to end by themselves. The exit code is that of the first to fail.
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

mark() { trap '' TERM INT && exec sed -u "s/^/[$1] /"; } # the signals are not for it
for ((k = 0; k < processes; k++)); do
    "$@" "--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$k" \
        > >(mark "$k") 2> >(mark "$k" >&2) < /dev/null &
    pids+=($!)
done
for ((left = processes; left > 0; left--)); do
    wait -n 2> /dev/null
    status=$?
    if ((signalled)); then # the signal ended the wait, no process did
        signalled=0 left=$((left + 1))
    elif ((status && status != 127 && !code)) && code=$status; then
        (sleep "${GRACE:-20}" && tell KILL) > /dev/null 2>&1 &
        guard=$!
        disown
    fi
done
for pid in "${pids[@]}"; do wait "$pid" || ((code)) || code=$?; done
exit "$code"
