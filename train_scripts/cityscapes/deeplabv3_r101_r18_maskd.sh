#!/usr/bin/env bash
# Cityscapes, DeepLabV3-ResNet101 -> DeepLabV3-ResNet18, MasKD: 77.00 mIoU published (teacher 78.07, student alone
# 74.21).
# Learns its masks first (10k iterations, cached in the run's folder). The released code does so with the teacher in
# train mode, dropout and synchronized batch norm included: hence --compat reference. Without it the teacher is in
# eval mode. Published with a larger weight decay than the other rows. The student alone was not trained again with
# it. As published, the learning rate of this row tends to 0.0001 in place of 0, and it is validated every 400
# iterations, which doubles the candidates for the best model.
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
    --method maskd --lambda-maskd 1.0 --maskd-aux-weight 0.4 \
    --maskd-tokens 8 --maskd-steps 10000 --maskd-batch-size 16 --maskd-lr 0.1 --compat reference \
    --workers 8 --val-per-iters 400 --save-per-iters 400 --log-iter 10 \
    --save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"
