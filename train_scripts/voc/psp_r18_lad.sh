#!/usr/bin/env bash
# Pascal VOC (aug), PSPNet-ResNet18, LAD: 75.40 mIoU published (student alone 73.33).
# Published with one decimal. The teacher, a DeepLabV3-ResNet18 that is shown noisy labels, is trained first by the
# same command (cached in the run's folder). The released code has a learning rate of 0.001 and a student that starts
# from trained weights; this is the schedule of the other rows (--lr 0.001 --student-pretrained FILE come closer).
# GPUS, DATA, TEACHER, ...: see ../common.sh. More flags are passed on. Written by tools/make_scripts.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh" voc

train \
    --dataset voc --data "$DATA" --crop-size 512 512 --max-iterations 40000 \
    --batch-size 16 --lr 0.02 --momentum 0.9 --weight-decay 0.0001 --poly-power 0.9 --aux-weight 0.02 \
    --student-model psp --student-backbone resnet18 \
    --student-pretrained-base "$CKPT/resnet18-imagenet.pth" \
    --method lad --lambda-lad 3.0 \
    --lad-model deeplabv3 \
    --workers 8 --val-per-iters 800 --save-per-iters 800 --log-iter 10 \
    --save-dir "$WORK_DIR" --log-dir "$LOG_DIR" "$@"
