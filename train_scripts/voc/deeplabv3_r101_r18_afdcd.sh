#!/usr/bin/env bash
# Pascal VOC (aug), DeepLabV3-ResNet101 -> DeepLabV3-ResNet18, Af-DCD: 76.25 mIoU published (teacher 77.67, student
# alone 73.21).
# GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" voc

train \
    --dataset voc --data "$DATA" --crop-size 512 512 --max-iterations 40000 \
    --batch-size 16 --lr 0.02 --momentum 0.9 --weight-decay 0.0001 --poly-power 0.9 --aux-weight 0.4 \
    --teacher-model deeplabv3 --teacher-backbone resnet101 \
    --teacher-pretrained "${TEACHER:-$CKPT/deeplabv3_resnet101_pascal_aug_best_model.pth}" \
    --student-model deeplabv3 --student-backbone resnet18 \
    --student-pretrained-base "$CKPT/resnet18-imagenet.pth" \
    --method afdcd --lambda-kd 1.0 --lambda-fd 0.000001 --lambda-ctr 0.005 \
    --rand-mask true --enhance-projector false --mask-ratio 0.75 \
    --kd-temperature 1.0 --tau-ocd 0.07 --m-ocd 16 --pool-size 4 --patch-size 4 4 --clip-distiller 15.0 \
    --workers 8 --val-per-iters 800 --save-per-iters 800 --log-iter 10 \
    --save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"
