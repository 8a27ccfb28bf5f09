#!/bin/bash
# Several nodes: sbatch training/launch/slurm.sh training/recipes/f2llm-v2/stage1-4b.yaml [--key value …]
# The repository and the output folder lie on a file system that all nodes see. A job that is preempted, comes to the end
# of its time or loses a node is queued again and goes on from its last checkpoint.
#SBATCH --job-name=f2llm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300           # five minutes before the time is up: step, checkpoint, end
set -euo pipefail

# The launcher gives its processes this long after a signal, in seconds; the default of 30 is too short for a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-8}}     # on each node

# One launcher on each node; --resume starts anew where there is nothing to resume. srun returns the highest status:
# 100 if a launcher failed, though the others were then stopped, and 75 if all were stopped.
status=0
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  trap "stopped=75" TERM
  .venv/bin/accelerate launch --config_file training/launch/fsdp.yaml \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes $((SLURM_NNODES * PROCESSES)) \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    training/run_stage.py "$@" --resume || exit ${stopped:-100}' launch "$@" || status=$?

# Slurm itself queues again only what it has to kill. `scancel` ends this shell before it gets here. The limit ends what
# would never get further, because its time is too short.
if [ "$status" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
