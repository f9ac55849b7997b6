# What becomes of a job when its command has ended. Sourced by train.sbatch and array.sbatch.
#
#   0         done
#   2         the user's mistake: never again
#   85        stopped by a signal, with a complete checkpoint: requeue
#   138, 143  killed by SIGUSR1 or SIGTERM before it could listen: requeue
#   others    a fault (a full disk, a dead node, a command that this node does not have): requeue
#
# Counted since the run's newest checkpoint last moved on: EVA02_AT_MAX_FAULTS faults (3) and
# EVA02_AT_MAX_STOPS stops (50) are tried again. The counts lie in a folder of the job's; where it
# cannot be kept, SLURM's own count of restarts stands in for both.

# A task of an array is named like this; by its SLURM_JOB_ID scontrol may take the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
export EVA02_AT_JOB="${EVA02_AT_LOGS:-$PWD}/.slurm-jobs/$job"
remembered=yes
if ((${SLURM_RESTART_COUNT:-0} == 0)); then
    rm -rf "$EVA02_AT_JOB" # of an older job with this number
elif [[ ! -d $EVA02_AT_JOB ]]; then
    remembered=no
fi
mkdir -p "$EVA02_AT_JOB" || remembered=no

# Goes in front of a task's command. Where this node lacks the command, bash says 126 or 127;
# slurmstepd would say 2, the user's mistake.
# shellcheck disable=SC2016
ON_NODE=(bash -O execfail -c '
    exec "$@"
    code=$?
    echo "$SLURMD_NODENAME" >>"$EVA02_AT_JOB/bad-nodes"
    exit $code' eva02-at)

# Step of the newest complete checkpoint; rank 0 has written down where they are.
newest_step() {
    local root found
    root=$(cat "$EVA02_AT_JOB/checkpoints" 2>/dev/null) || root=/nowhere
    found=$(find "$root" -mindepth 2 -maxdepth 2 -path '*/step-*/manifest.json' 2>/dev/null |
        sort | tail -n 1)
    found=${found%/manifest.json}
    found=${found##*/step-}
    echo $((10#${found:-0}))
}

finish() {
    local code=$1 step known=-1 faults=0 stops=0 what count most
    if ((code == 0 || code == 2)); then
        rm -rf "$EVA02_AT_JOB"
        exit "$code"
    fi
    step=$(newest_step)
    # shellcheck disable=SC2162
    read known faults stops 2>/dev/null <"$EVA02_AT_JOB/counts"
    if ((step > ${known:--1})); then faults=0 stops=0; fi
    case "$code" in
        85 | 138 | 143) what=stop count=$((++stops)) most=${EVA02_AT_MAX_STOPS:-50} ;;
        *) what=fault count=$((++faults)) most=${EVA02_AT_MAX_FAULTS:-3} ;;
    esac
    if ! echo "$step $faults $stops" >"$EVA02_AT_JOB/counts" || [[ $remembered == no ]]; then
        echo "slurm: $EVA02_AT_JOB is not kept from start to start; counting all restarts" >&2
        count=$((${SLURM_RESTART_COUNT:-0} + 1))
    fi
    echo "slurm: exit code $code, $what $count of at most $most since step $step" >&2
    if ((count > most)); then
        echo "slurm: giving up" >&2
        rm -rf "$EVA02_AT_JOB"
        exit "$code"
    fi
    requeue "$code"
}

# With EVA02_AT_EXCLUDE=1 the next start keeps off the nodes that a fault was put down to.
requeue() {
    local bad=""
    if [[ ${EVA02_AT_EXCLUDE:-0} == 1 && -s $EVA02_AT_JOB/bad-nodes ]]; then
        bad=$(sort -u "$EVA02_AT_JOB/bad-nodes" | paste -sd,)
        trap '' TERM # scontrol ends this script, but only a job in the queue can be changed
    fi
    echo "slurm: requeueing job $job after exit code $1"
    if ! scontrol requeue "$job"; then
        echo "slurm: this job cannot be requeued (--no-requeue, or salloc); submit it again to go" \
            "on from its checkpoint" >&2
        exit "$1"
    fi
    if [[ -n $bad ]]; then
        echo "slurm: keeping off $bad"
        scontrol update "JobId=$job" "ExcNodeList=$bad"
    fi
    sleep 60 # scontrol ends this script; an exit before that would count as the job's end
    exit "$1"
}
