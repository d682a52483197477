#!/usr/bin/env bash
# Run a suite inside one Slurm allocation, with one Ray node per Slurm node. Copy this file, adapt it and submit it:
#
#     sbatch --nodes=2 --cpus-per-task=32 --gpus-per-node=4 --time=4:00:00 slurm.sh uncond --gpus all --store "$SCRATCH/bench"
#
# The arguments after the script's name go to `bench run`. The store must be on a file system that all nodes share. To
# resume, submit the same command again. Two allocations may run it at the same time. The script starts no new job in the
# last five minutes of the allocation.
#
# RAY_AUTH_TOKEN_PATH: file with the cluster's secret, on a file system that all nodes share. Only its owner can read it.
# The script creates the file if it does not exist.
#
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:INT@300
set -euo pipefail

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray-token}" RAY_USAGE_STATS_ENABLED=0
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then # `ln` is atomic: two allocations that start together agree on one token
    (umask 077 && python3 -c "import secrets; print(secrets.token_hex(32))" >"$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID")
    ln "$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID" "$RAY_AUTH_TOKEN_PATH" 2>/dev/null || true
    rm -f "$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID"
fi

cpus="${SLURM_CPUS_PER_TASK:-1}" # without this, Ray counts all processors of the machine
node=(--ntasks-per-node=1 --cpus-per-task="$cpus")
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
names="$(srun "${node[@]}" --nodes=1 --ntasks=1 -w "$head" hostname --ip-address)"
host="$(tr ' ' '\n' <<<"$names" | grep -m 1 -v '^127\.' || echo "${names%% *}")" # some hosts also report 127.0.1.1
address="$host:$((20000 + SLURM_JOB_ID % 20000))"

srun "${node[@]}" --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --port="${address##*:}" --num-cpus="$cpus" --include-dashboard=false --block &
tries=0
until ray status --address "$address" >/dev/null 2>&1; do
    tries=$((tries + 1))
    if [ "$tries" -ge 60 ]; then
        echo "no Ray head at $address; see the output above for the reason" >&2
        exit 1
    fi
    sleep 1
done
if [ "$SLURM_NNODES" -gt 1 ]; then
    others=$((SLURM_NNODES - 1))
    srun "${node[@]}" --nodes="$others" --ntasks="$others" -x "$head" \
        ray start --address="$address" --num-cpus="$cpus" --block &
fi
exec bench run "$@" --engine ray --address "$address"
