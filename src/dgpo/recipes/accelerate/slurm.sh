#!/bin/bash
# Several machines by SLURM: sbatch recipes/accelerate/slurm.sh RECIPE [KEY=VALUE ...]
#SBATCH --job-name=dgpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu

# --signal=TERM@120: two minutes before its time is over the run saves a checkpoint and ends.
# A job that is started again, by --requeue or by hand, goes on from it.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RUN=${RUN:-runs/$SLURM_JOB_NAME}
RESUME=()
if [ -d "$RUN/checkpoints" ]; then RESUME=(--resume); fi

srun --kill-on-bad-exit=1 bash -c 'exec torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
  --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --master-addr "$MASTER_ADDR" --master-port 29500 \
  -m dgpo train "$@"' bash "$@" run.dir="$RUN" "${RESUME[@]}"
