#!/usr/bin/env bash
#SBATCH --job-name=stackelberg
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
# The matrix of a launcher as a Slurm job array, one run a task. Variables as in matrix.sh, further options as for sbatch:
#
#     SEEDS="1 2 3" benchmark/slurm.sh benchmark/stsac.sh --time=2-0 --partition=cpu
#     SEEDS="1 2 3" sbatch --array=0-47%8 benchmark/slurm.sh benchmark/stsac.sh     # the same by hand, 8 at a time
#
# A task's number is its line of --dry-run, from 0. A task that is requeued, or submitted again, carries its run on.
set -eo pipefail
if [ -z "${SLURM_ARRAY_TASK_ID-}" ]; then
  count=$("$1" --dry-run | wc -l)
  mkdir -p runs/logs
  exec sbatch --array="0-$((count - 1))" --output=runs/logs/slurm-%A_%a.out "${@:2}" "$0" "$1"
fi
exec "$1" --task "$SLURM_ARRAY_TASK_ID"
