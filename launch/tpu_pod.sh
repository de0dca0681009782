#!/usr/bin/env bash
# Runs a verb on every host of a Cloud TPU slice; the hosts find each other by themselves.
#   export TPU=enat ZONE=us-west4-a
#   launch/tpu_pod.sh start train --config=configs/enat_l_256.py --workdir=/mnt/enat/run
#   launch/tpu_pod.sh watch    # what process 0 says; Ctrl-C leaves the run alone
#   launch/tpu_pod.sh stop     # SIGTERM: all save the same step, then end
# The code is in ~/enat_jax on every host, installed into ~/enat_jax/.venv: launch/README.md.
set -euo pipefail
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"

on() { # on WORKERS COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

case ${1:-} in
start)
    shift
    [[ $# -gt 0 ]] || { echo "usage: $0 start VERB --flag=value ..." >&2; exit 2; }
    # setsid: the run outlives the connection that started it
    on all "cd enat_jax && { ! kill -0 \$(cat enat.pid 2>/dev/null) 2>/dev/null || exit 1; }
        setsid nohup .venv/bin/enat $(printf '%q ' "$@") > enat.log 2>&1 < /dev/null &
        echo \$! > enat.pid"
    ;;
watch) on 0 "tail -n 50 -F enat_jax/enat.log" ;;
stop) on all "kill -TERM \$(cat enat_jax/enat.pid)" ;;
*)
    echo "usage: $0 start VERB --flag=value ... | watch | stop" >&2
    exit 2
    ;;
esac
