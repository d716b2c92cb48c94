# Sourced by the batch scripts beside it, which are submitted from the repository's folder.
#
# VENV          environment of verippo                            .venv
# SGLANG_VENV   environment of sglang, for the servers            sglang-env
# OUTPUT        folder of the run, which all nodes reach
# PORT          port of the servers; the ranks meet on the next   30000

set -euo pipefail

VENV=${VENV:-.venv}
SGLANG_VENV=${SGLANG_VENV:-sglang-env}
PORT=${PORT:-30000}
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
stopped=false

# The job's nodes from number $1 on, at most $2 of them, with commas between.
nodes() {
    scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n "+$(($1 + 1))" | head -n "$2" | paste -sd,
}

# Runs `verippo "${@:2}"` with one rank for each GPU of the nodes $1, to its end or until Slurm asks the
# job to stop. SIGUSR1 (before the time limit, see #SBATCH --signal) and SIGTERM (preemption) then make
# the run save its last finished step, and the job goes back to the queue: started again, it resumes.
train() {
    local nodes=$1 number step status=0
    shift
    number=$(tr ',' '\n' <<<"$nodes" | wc -l)
    export MASTER_ADDR=${nodes%%,*} MASTER_PORT=$((PORT + 1000))
    # every rank sees all GPUs of its node and takes the one of its local number
    srun --overlap --nodes="$number" --nodelist="$nodes" --ntasks="$((number * GPUS_PER_NODE))" \
        --ntasks-per-node="$GPUS_PER_NODE" --gpu-bind=none --kill-on-bad-exit=1 \
        "$VENV/bin/python" -m verippo.launch.cli "$@" &
    step=$!
    trap 'stopped=true; kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
    wait "$step" || status=$?
    while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` before the step has ended
        status=0
        wait "$step" || status=$?
    done
    trap - USR1 TERM
    return "$status"
}

# Puts the job back into the queue if it was stopped before the run had exported its model.
requeue_if_stopped() {
    if $stopped && [[ ! -d $OUTPUT/model ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}

# Starts an sglang server on each of the nodes $1 with the options "${@:2}" of `verippo serve start`,
# waits until all of them answer, and sets URLS.
start_servers() {
    local nodes=$1 number node waited=0
    shift
    number=$(tr ',' '\n' <<<"$nodes" | wc -l)
    SERVER_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    export SERVER_KEY
    srun --overlap --nodes="$number" --nodelist="$nodes" --ntasks="$number" --ntasks-per-node=1 \
        --gpu-bind=none --kill-on-bad-exit=1 "$VENV/bin/verippo" serve start \
        --python "$SGLANG_VENV/bin/python" --host 0.0.0.0 --port "$PORT" --api_key_env SERVER_KEY \
        --foreground true "$@" &
    servers=$!
    URLS=""
    for node in ${nodes//,/ }; do
        until curl -sf -o /dev/null "http://$node:$PORT/health"; do
            kill -0 "$servers" 2>/dev/null || { echo "the servers ended: see their logs" >&2; exit 1; }
            ((waited < 3600)) || { echo "$node: no server answers" >&2; exit 1; }
            sleep 10
            waited=$((waited + 10))
        done
        URLS+=${URLS:+,}http://$node:$PORT
    done
}

# Ends the servers that start_servers started.
stop_servers() {
    kill -TERM "$servers" 2>/dev/null || true
    wait "$servers" || true
}
