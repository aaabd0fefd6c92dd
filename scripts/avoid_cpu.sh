#!/usr/bin/env bash
# The demo by hand: six modes, some ten minutes on two CPU cores. Usage: scripts/avoid_cpu.sh [FOLDER]
set -euo pipefail
run=${1:-runs/avoid_cpu}

diffusion-policy collect  --env diffusion_policy/Avoid-v0 --episodes 240 --seed 0 --output "$run/demonstrations.zarr"
diffusion-policy train    --dataset "$run/demonstrations.zarr" --output "$run/policy" \
                          --widths 32 64 128 --steps 5000 --learning-rate 1e-3
diffusion-policy evaluate --checkpoint "$run/policy" --episodes 100 --seed 100000 --output "$run/evaluation"
diffusion-policy rollout  --checkpoint "$run/policy" --episodes 4 --video "$run/rollout.mp4"
