#!/bin/bash
# Trains on several machines:  sbatch examples/slurm.sh method=disback data=imagenet64
# Two minutes before the time is up the run saves, asks to be queued again, and goes on there by itself.
# Another size:  sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 examples/slurm.sh ...
#SBATCH --job-name=stillhouse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f train.py ]; then
  echo "error: no train.py in $PWD: run sbatch in the project's folder" >&2
  exit 1
fi

# Where the processes meet: the first machine, and a port of this job's own.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# One process for each GPU. Arguments of yours come last, so they win.
srun --kill-on-bad-exit=1 "${PYTHON:-python}" train.py \
  trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE" "$@"
