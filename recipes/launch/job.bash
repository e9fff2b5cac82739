
# From here on the script is the same for every job.
set -uo pipefail
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of the process that has submitted the job

say() { echo "gpt-oss-vision: $*"; }

for name in "${variables[@]}"; do
    if [ -z "${!name+set}" ]; then
        say "$name is not set: set it where the job is submitted, with \`export $name=...\`, and submit again"
        exit 2
    fi
done

# SLURM's own address of the first node needs no name service.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR

# Written by the run. Its first line is `finished`, `saved`, `refused` or `failed`; a sentence follows.
export GPT_OSS_VISION_OUTCOME=$run/launch/outcome-$SLURM_JOB_ID.txt
outcome() { if [ -f "$GPT_OSS_VISION_OUTCOME" ]; then head -n 1 "$GPT_OSS_VISION_OUTCOME"; else echo killed; fi; }
sentence() {
    if [ -f "$GPT_OSS_VISION_OUTCOME" ]; then tail -n +2 "$GPT_OSS_VISION_OUTCOME"; else echo "a process was killed, or printed why"; fi
}

requeue() {
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format="%T %r")
    # A job that SLURM ends is COMPLETING: cancelled, or preempted, which SLURM itself requeues; or at its time limit.
    if [ "${state%% *}" != RUNNING ] && [ "${state##* }" != TimeLimit ]; then
        say "SLURM ends the job; the run is saved, and continues with: sbatch $script"
    elif ((${SLURM_RESTART_COUNT:-0} >= requeues)); then
        say "The job was requeued $requeues times and ends here; the run is saved, and continues with: sbatch $script"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "The run is saved; the job returns to the queue"
        sleep 60 # SLURM ends this script
    else
        say "SLURM does not requeue this job; the run is saved, and continues with: sbatch $script"
    fi
    exit 75
}

fail() {
    say "The run failed: $(sentence)"
    exit 1
}

# SLURM sends SIGTERM to this shell too when it cancels or preempts the job; the shell has to wait for the run.
trap : TERM USR1

# Run a command in the allocation until it is finished: run_to_end RETRIES OPTION_OF_SRUN... -- WORD...
# --wait=0: tasks that are still writing when the first one has ended are not killed.
run_to_end() {
    local retries=$1 options=() failures=0 code
    shift
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    while true; do
        rm -f "$GPT_OSS_VISION_OUTCOME"
        export MASTER_PORT=$((15000 + (SLURM_JOB_ID + 7919 * failures) % 15000))
        srun --kill-on-bad-exit=1 --wait=0 "${srun_options[@]}" "${options[@]}" "${prefix[@]}" "$@"
        code=$?
        if ((code == 0)); then return; fi
        case $(outcome) in
            finished) return ;;
            saved) requeue ;;
            refused) fail ;;
        esac
        case $code in
            2) fail ;;            # the command line is wrong
            138 | 143) requeue ;; # SIGUSR1 or SIGTERM, and nothing to save
        esac
        if ((failures >= retries)); then fail; fi
        failures=$((failures + 1))
        say "The run failed: $(sentence); restart $failures of $retries from the newest checkpoint"
    done
}

run_to_end "$retries_of_training" -- "${train[@]}"
if ((${#export_command[@]})); then
    run_to_end "$retries" --nodes=1 --ntasks=1 --ntasks-per-node=1 -- "${export_command[@]}"
fi
say "The run is finished"
