#!/usr/bin/env bash
# Cityscapes, DeepLabV3-ResNet101 -> DeepLabV3-ResNet18, DIST: 77.10 mIoU published (teacher 78.07, student alone
# 74.21).
# Published with a larger weight decay than the other rows. The student alone was not trained again with it. As
# published, the learning rate of this row tends to 0.0001 in place of 0, and it is validated every 400 iterations,
# which doubles the candidates for the best model.
# GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" citys

train \
    --dataset citys --data "$DATA" --crop-size 512 1024 --max-iterations 40000 \
    --batch-size 16 --lr 0.02 --min-lr 0.0001 --momentum 0.9 --weight-decay 0.0005 --poly-power 0.9 --aux-weight 0.4 \
    --teacher-model deeplabv3 --teacher-backbone resnet101 \
    --teacher-pretrained "${TEACHER:-$CKPT/deeplabv3_resnet101_citys_best_model.pth}" \
    --student-model deeplabv3 --student-backbone resnet18 \
    --student-pretrained-base "$CKPT/resnet18-imagenet.pth" \
    --method dist --lambda-dist 1.0 --dist-aux-weight 0.4 \
    --dist-temperature 1.0 --dist-beta 1.0 --dist-gamma 1.0 --group-size 2 \
    --workers 8 --val-per-iters 400 --save-per-iters 400 --log-iter 10 \
    --save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"
