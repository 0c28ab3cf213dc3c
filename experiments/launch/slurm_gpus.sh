#!/usr/bin/env bash
# A training on GPU nodes with SLURM: one process per GPU, joined by JAX.
#
#   sbatch --nodes=8 experiments/launch/slurm_gpus.sh --config=configs/racm3_2b7.py \
#     --workdir=/shared/racm3_2b7 --config.memory_path=/shared/memory
#
# Submit it from the folder of the project, with an environment that has racm3_jax[gpu].
# Three minutes before the time limit SLURM sends SIGTERM: the training saves, ends with
# status 75 and is queued again. DRY_RUN=1 prints the command.
#SBATCH --job-name=racm3
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

if (($# == 0)); then
  sed -n '2,9p' "$0"
  exit 2
fi
# By default JAX takes three quarters of a GPU's memory.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
command=(srun --kill-on-bad-exit=0 racm3 train "$@")
if [[ ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
"${command[@]}"
status=$?
if ((status == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
