#!/usr/bin/env bash
# BlockPush from scripted demonstrations: some 45 minutes on two CPU cores. Usage: scripts/block_push.sh [FOLDER]
set -euo pipefail
run=${1:-runs/block_push}

diffusion-policy collect  --env diffusion_policy/BlockPush-v0 --episodes 1000 --seed 0 --output "$run/demonstrations.zarr"
diffusion-policy train    --dataset "$run/demonstrations.zarr" --output "$run/policy" --observation relative \
                          --observation-horizon 1 --prediction-horizon 8 --action-horizon 4 --validation-share 0.02 \
                          --batch-size 128 --steps 17000 --learning-rate 4e-4 --ema-max-decay 0.9999
diffusion-policy evaluate --checkpoint "$run/policy" --episodes 200 --seed 100000 --output "$run/evaluation"
