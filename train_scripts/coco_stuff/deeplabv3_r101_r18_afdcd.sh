#!/usr/bin/env bash
# COCO-Stuff-164K, DeepLabV3-ResNet101 -> DeepLabV3-ResNet18, Af-DCD: 34.02 mIoU published (teacher 38.71, student
# alone 32.60).
# GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" coco_stuff_164k

train \
    --dataset coco_stuff_164k --data "$DATA" --crop-size 512 512 --max-iterations 80000 \
    --batch-size 16 --lr 0.02 --momentum 0.9 --weight-decay 0.0001 --poly-power 0.9 --aux-weight 0.4 \
    --teacher-model deeplabv3 --teacher-backbone resnet101 \
    --teacher-pretrained "${TEACHER:-$CKPT/deeplabv3_resnet101_coco_stuff_164k_best_model.pth}" \
    --student-model deeplabv3 --student-backbone resnet18 \
    --student-pretrained-base "$CKPT/resnet18-imagenet.pth" \
    --method afdcd --lambda-kd 0.5 --lambda-fd 0.000005 --lambda-ctr 0.005 \
    --rand-mask true --enhance-projector false --mask-ratio 0.75 \
    --kd-temperature 1.0 --tau-ocd 0.07 --m-ocd 16 --pool-size 4 --patch-size 4 4 --clip-distiller 15.0 \
    --workers 8 --val-per-iters 800 --save-per-iters 800 --log-iter 10 \
    --save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"
