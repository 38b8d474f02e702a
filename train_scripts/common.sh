# shellcheck shell=bash
# Sourced by every script of this folder with the name of a data set: `source common.sh citys`.
#
# Settings, from the environment (defaults in brackets; the default folders lie in the repository):
#   GPUS       processes, one per GPU [all GPUs seen here; published runs: 8; 0 = one process on the CPU]
#   DATA       folder of the data set [DATA_ROOT/<usual name>]        DATA_ROOT  [data]
#   CKPT       folder of the released files [pretrained_ckpt]         TEACHER    one teacher file [in CKPT]
#   WORK_DIR   weights and training state [work_dir/<data set>/<script>]
#   LOG_DIR    logs and TensorBoard [log_dir/<data set>/<script>]
#   PYTHON     interpreter [.venv/bin/python if tools/setup_env.sh made it, else python3]
#   NNODES, NODE_RANK, MASTER_ADDR, PORT   for several machines [1, 0, localhost, 29500]; slurm.sh sets them
#   DRY_RUN=1  print the command instead of running it
# The batch size is that of all processes together, so it has to be a multiple of their number.

# The variables serve the script that sources this file.
# shellcheck disable=SC2034
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $PWD -ef $ROOT ]]; then IN=""; else IN="$ROOT/"; fi

count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

case ${1:?usage: source common.sh DATASET} in
    citys) FOLDER=cityscapes DATA_NAME=cityscapes ;;
    ade20k) FOLDER=ade20k DATA_NAME=ade20k ;;
    coco_stuff_164k) FOLDER=coco_stuff DATA_NAME=coco_stuff_164k ;;
    voc) FOLDER=voc DATA_NAME=VOCAug ;;
    camvid) FOLDER=camvid DATA_NAME=CamVid ;;
    *) FOLDER=$1 DATA_NAME=$1 ;;
esac
NAME=$(basename "$0" .sh)
GPUS=${GPUS:-$(count_gpus)}
DATA=${DATA:-${DATA_ROOT:-${IN}data}/$DATA_NAME}
CKPT=${CKPT:-${IN}pretrained_ckpt}
WORK_DIR=${WORK_DIR:-${IN}work_dir/$FOLDER/$NAME}
LOG_DIR=${LOG_DIR:-${IN}log_dir/$FOLDER/$NAME}
source "$ROOT/train_scripts/python.sh"
if ! [[ $GPUS =~ ^[0-9]+$ ]]; then
    echo "GPUS=$GPUS: expected a number of processes, 0 for the CPU" >&2
    exit 2
fi

# launch PROGRAM ARGUMENTS...: a program of the repository on $GPUS GPUs of each of $NNODES machines, or on the CPU. It
# takes the place of the script: signals reach it, and its exit code is the script's.
launch() {
    local program=${IN}$1 command
    shift
    if ((GPUS == 0)); then
        command=("$PYTHON" "$program" --no-cuda "$@")
    elif ((GPUS == 1 && ${NNODES:-1} == 1)); then
        command=("$PYTHON" "$program" "$@") # no launcher: an error stays one line
    else
        command=("$PYTHON" -m torch.distributed.run --nproc_per_node "$GPUS")
        if ((${NNODES:-1} > 1)); then
            command+=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-${SLURM_NODEID:-0}}")
            command+=(--master_addr "${MASTER_ADDR:?NNODES is $NNODES: MASTER_ADDR must name the first machine}")
            command+=(--master_port "${PORT:-29500}")
        else
            command+=(--standalone) # picks a free port, so that several runs fit on one machine
        fi
        command+=("$program" "$@")
    fi
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        check_environment
        exec "${command[@]}"
    fi
}

train() { launch train_kd.py "$@"; }
