#!/usr/bin/env bash
# Runs a suite inside one Slurm allocation, with a Ray node on each of its nodes. Copy it, and submit for example
#
#     sbatch --nodes=2 --cpus-per-task=32 --gpus-per-node=4 --time=4:00:00 slurm.sh uncond --gpus all --store "$SCRATCH/bench"
#
# What follows the script's name goes to `bench run`. The store lies on a file system that all nodes see; the same
# command, submitted again or twice at once, goes on from there. Five minutes before the time is up no job is begun.
#
# RAY_AUTH_TOKEN_PATH: the cluster's secret, readable by its owner alone, where all nodes see it; made if there is none.
#
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:INT@300
set -euo pipefail

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray-token}" RAY_USAGE_STATS_ENABLED=0
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then # whole, and by one of two allocations that begin at once
    (umask 077 && python3 -c "import secrets; print(secrets.token_hex(32))" >"$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID")
    ln "$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID" "$RAY_AUTH_TOKEN_PATH" 2>/dev/null || true
    rm -f "$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID"
fi

cpus="${SLURM_CPUS_PER_TASK:-1}" # Ray would count the whole machine's
node=(--ntasks-per-node=1 --cpus-per-task="$cpus")
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
names="$(srun "${node[@]}" --nodes=1 --ntasks=1 -w "$head" hostname --ip-address)"
host="$(tr ' ' '\n' <<<"$names" | grep -m 1 -v '^127\.' || echo "${names%% *}")" # some hosts call themselves 127.0.1.1, too
address="$host:$((20000 + SLURM_JOB_ID % 20000))"

srun "${node[@]}" --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --port="${address##*:}" --num-cpus="$cpus" --include-dashboard=false --block &
tries=0
until ray status --address "$address" >/dev/null 2>&1; do
    tries=$((tries + 1))
    if [ "$tries" -ge 60 ]; then
        echo "no Ray head at $address; the lines above may say why" >&2
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
