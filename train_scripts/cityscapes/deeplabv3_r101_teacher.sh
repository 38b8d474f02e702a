#!/usr/bin/env bash
# Cityscapes, teacher DeepLabV3-ResNet101: 78.07 mIoU published.
# We do not know the schedule of the released file; this is that of the students. To distil from yours:
# TEACHER=work_dir/cityscapes/deeplabv3_r101_teacher/kd_deeplabv3_resnet101_citys_best_model.pth bash SCRIPT
# GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" citys

train \
    --dataset citys --data "$DATA" --crop-size 512 1024 --max-iterations 40000 \
    --batch-size 16 --lr 0.02 --momentum 0.9 --weight-decay 0.0001 --poly-power 0.9 --aux-weight 0.4 \
    --student-model deeplabv3 --student-backbone resnet101 \
    --student-pretrained-base "$CKPT/resnet101-imagenet.pth" \
    --method none \
    --workers 8 --val-per-iters 800 --save-per-iters 800 --log-iter 10 \
    --save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"
