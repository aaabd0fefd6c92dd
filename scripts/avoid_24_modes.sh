#!/usr/bin/env bash
# Three rows of cylinders, 24 modes: some 20 minutes of training on one CPU core, then 240 unseen seeds.
# Usage: scripts/avoid_24_modes.sh [FOLDER]
set -euo pipefail
run=${1:-runs/avoid_24_modes}

diffusion-policy collect  --env-kwargs '{"rows": 3}' --episodes 960 --output "$run/demonstrations.zarr"
diffusion-policy train    --dataset "$run/demonstrations.zarr" --output "$run/policy" --widths 32 64 128 \
    --steps 8000 --learning-rate 1e-3
diffusion-policy evaluate --checkpoint "$run/policy" --episodes 240 --output "$run/evaluation"
