#!/usr/bin/env bash
# Three rows of cylinders, 24 modes, 480 rollouts as D3IL evaluates: for a GPU. Usage: scripts/avoid_24_modes.sh [FOLDER]
set -euo pipefail
run=${1:-runs/avoid_24_modes}

diffusion-policy collect  --env-kwargs '{"rows": 3}' --episodes 960 --output "$run/demonstrations.zarr"
diffusion-policy train    --dataset "$run/demonstrations.zarr" --output "$run/policy" --steps 50000
diffusion-policy evaluate --checkpoint "$run/policy" --episodes 480 --output "$run/evaluation"
