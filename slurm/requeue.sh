# What becomes of a job when its command has ended. Sourced by train.sbatch and array.sbatch.
#
#   0         done
#   2         the user's mistake: never again
#   85        stopped by a signal, with a complete checkpoint: requeue
#   138, 143  killed by SIGUSR1 or SIGTERM before it could listen: requeue
#   others    a fault (a dead node, say): requeue, but at most EVA02_AT_MAX_FAULTS times (3)

finish() {
    local code=$1 faults="${EVA02_AT_LOGS:-.}/faults-${SLURM_JOB_ID}" count
    case "$code" in
        0 | 2)
            rm -f "$faults"
            exit "$code"
            ;;
        85 | 138 | 143) ;;
        *)
            count=$(($(cat "$faults" 2>/dev/null || echo 0) + 1))
            echo "$count" >"$faults"
            if ((count > ${EVA02_AT_MAX_FAULTS:-3})); then
                echo "slurm: exit code $code, fault number $count: giving up" >&2
                exit "$code"
            fi
            echo "slurm: exit code $code, fault number $count: trying again" >&2
            ;;
    esac
    echo "slurm: requeueing job $SLURM_JOB_ID after exit code $code"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        echo "slurm: this job cannot be requeued (--no-requeue, or salloc); submit it again to go" \
            "on from its checkpoint" >&2
        exit "$code"
    fi
    sleep 60 # scontrol ends this script; an exit before that would count as the job's end
    exit "$code"
}
