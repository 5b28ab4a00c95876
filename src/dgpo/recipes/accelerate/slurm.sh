#!/bin/bash
# Several machines by SLURM: sbatch recipes/accelerate/slurm.sh RECIPE [KEY=VALUE ...]
#SBATCH --job-name=dgpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

# 300 s before its time is over this script hears of it (--signal), asks the run to stop, and puts
# the job into the queue again, which then goes on from the checkpoint. A stop is heard between two
# (micro-)batches of pictures, and then a checkpoint is written: all of that must fit
# into GRACE seconds, after which torchrun kills, and GRACE into the time of --signal. --requeue
# does the same after a preemption or the failure of a machine; before a preemption the cluster
# itself sends SIGTERM, and leaves the time that it calls GraceTime.
GRACE=${GRACE:-240}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RUN=${RUN:-runs/$SLURM_JOB_NAME}
RESUME=()
if [ -d "$RUN/checkpoints" ]; then RESUME=(--resume); fi

AGAIN=
stop() {
  AGAIN=yes
  scancel --signal=TERM "$SLURM_JOB_ID" # all steps of the job, not this script
}
trap stop USR1

srun --kill-on-bad-exit=1 bash -c 'exec torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
  --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --master-addr "$MASTER_ADDR" --master-port 29500 \
  -m dgpo train "$@"' bash "$@" run.dir="$RUN" "${RESUME[@]}" &
STEP=$!
while true; do # a signal ends wait before the step has ended
  CODE=0
  wait "$STEP" || CODE=$?
  if ! kill -0 "$STEP" 2> /dev/null; then break; fi
done
if [ -n "$AGAIN" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$CODE"
