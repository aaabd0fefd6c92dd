#!/usr/bin/env bash
# Push-T from the 206 published human demonstrations: 41 minutes on one CPU core; needs the extra pusht.
# Usage: scripts/push_t.sh pusht_cchi_v7_replay.zarr [FOLDER]
set -euo pipefail
demonstrations=$1
run=${2:-runs/push_t}

diffusion-policy train    --dataset "$demonstrations" --output "$run/policy" \
                          --observation state keypoint --angles state:4 --validation-share 0.02 \
                          --batch-size 128 --steps 12000 --weight-decay 0.1 --ema-max-decay 0.9999
diffusion-policy evaluate --checkpoint "$run/policy" --env diffusion_policy/PushT-v0 --episodes 200 --seed 100000 \
                          --output "$run/evaluation"
