#!/usr/bin/env bash
# Cityscapes, DeepLabV3-ResNet101 -> PSPNet-ResNet18, KT: 76.49 mIoU published (teacher 78.07, student alone 72.55).
# Published with a larger weight decay than the other rows. The released code compares the logits at crop size, as
# --compat reference does: the same but for cells that label edges cut, and slower.
# GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" citys

train \
    --dataset citys --data "$DATA" --crop-size 512 1024 --max-iterations 40000 \
    --batch-size 16 --lr 0.02 --momentum 0.9 --weight-decay 0.0005 --poly-power 0.9 --aux-weight 0.4 \
    --teacher-model deeplabv3 --teacher-backbone resnet101 \
    --teacher-pretrained "${TEACHER:-$CKPT/deeplabv3_resnet101_citys_best_model.pth}" \
    --student-model psp --student-backbone resnet18 \
    --student-pretrained-base "$CKPT/resnet18-imagenet.pth" \
    --method kt --lambda-kd 1.0 --lambda-kt-logit 1.0 --lambda-kt-feature 1.0 --lambda-kt-contrast 1.0 \
    --lambda-kt-aux 0.4 --kd-temperature 4.0 --kt-temperature 4.0 --kt-switch 10000 \
    --workers 8 --val-per-iters 800 --save-per-iters 800 --log-iter 10 \
    --save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"
