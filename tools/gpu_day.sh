#!/usr/bin/env bash
# A day with a GPU in at most nine minutes: checks, benchmark, profile and a short training, one JSON file each.
#
#   bash tools/gpu_day.sh [FOLDER]      results go to FOLDER [gpu_day]
#
# Needs Python 3.11 or newer with torch and numpy; nothing is downloaded. The benchmark and pytest need more: name in
# WHEELS a folder with wheels of opencv-python-headless, Pillow, tqdm, pytest and what pytest needs (iniconfig,
# packaging, pluggy, Pygments). A part that fails or takes too long does not stop the others. Runs on a CPU as well, for
# which SHORT=1 is meant.
#   PYTHON    interpreter [.venv/bin/python if tools/setup_env.sh made it, else python3]
#   WHEELS    folder of wheels, installed into FOLDER/packages
#   SHORT=1   small sizes, two minutes on two CPU cores: shows that everything runs
#   MINUTES   of everything together [9]
#   PARTS     which ones, in this order [report check tests contrast criterion step exact profile train memory]
# Exit code: 0 when every part has succeeded, 1 otherwise. FOLDER/summary.json says which, FOLDER/PART.log why.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${1:-gpu_day}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
PARTS=${PARTS:-report check tests contrast criterion step exact profile train memory}
END=$((SECONDS + ${MINUTES:-9} * 60))
SHORT_FLAG=() SMALL=()
if [[ -n ${SHORT:-} ]]; then
    SHORT_FLAG=(--short)
    SMALL=(--short)
elif "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    SMALL=(--fresh --repeats 2)
fi
if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$OUT/packages" "$WHEELS"/*.whl \
        >"$OUT/packages.log" 2>&1 || echo "packages: pip has failed, see $OUT/packages.log"
    export PYTHONPATH="$OUT/packages${PYTHONPATH:+:$PYTHONPATH}"
fi

# part_limit PART: the seconds that it may take
part_limit() {
    case $1 in
        report) echo 30 ;; check) echo 90 ;; tests) echo 60 ;; contrast) echo 50 ;; criterion) echo 70 ;;
        step) echo 120 ;; exact) echo 50 ;; profile) echo 70 ;; train) echo 80 ;; memory) echo 60 ;;
    esac
}

# part PART: run it; what it prints goes to the log too
part() {
    local gpu_only=(-m pytest -q -p no:cacheprovider -k 'gpu or cuda or triton' tests/test_methods.py tests/losses)
    case $1 in
        report | check | profile | train) "$PYTHON" tools/gpu_day.py "$1" --out "$OUT" "${SHORT_FLAG[@]}" ;;
        tests) if [[ -n ${SHORT:-} ]]; then gpu_only+=(--collect-only); fi; "$PYTHON" "${gpu_only[@]}" ;;
        contrast) "$PYTHON" tools/benchmark.py contrast --json "$OUT/contrast.json" "${SMALL[@]}" ;;
        criterion) "$PYTHON" tools/benchmark.py criterion --json "$OUT/criterion.json" "${SMALL[@]}" \
            --projector plain --batch 16 ;;
        step) "$PYTHON" tools/benchmark.py step --json "$OUT/step.json" "${SMALL[@]}" --batch "$BATCH" ;;
        # PyTorch multiplies in TF32 inside of convolutions by default: once without
        exact) NVIDIA_TF32_OVERRIDE=0 "$PYTHON" tools/benchmark.py step --json "$OUT/exact.json" "${SMALL[@]}" \
            --batch "$BATCH" --variants fast ;;
        memory) CUDA_VISIBLE_DEVICES='' "$PYTHON" tools/simulate_memory.py --json "$OUT/memory.json" \
            --rows citys-mbv2 --batch "$BATCH" "${SHORT_FLAG[@]}" ;;
        *) echo "unknown part $1" && return 2 ;;
    esac
}
BATCH=$([[ -n ${SHORT:-} ]] && echo 2 || echo 16)

failed=0
entries=()
for name in $PARTS; do
    left=$((END - SECONDS))
    limit=$(part_limit "$name")
    if [[ -n ${SHORT:-} ]]; then limit=$left; fi
    limit=$((${limit:-5} < left ? ${limit:-5} : left))
    if ((limit < 5)); then
        status=skipped code=-1 took=0
    else
        start=$SECONDS code=0
        export -f part
        export PYTHON OUT BATCH SHORT
        timeout --kill-after 5 "$limit" bash -c "$(declare -p SMALL SHORT_FLAG); part $name" >"$OUT/$name.log" 2>&1 || code=$?
        took=$((SECONDS - start))
        case $code in 0) status=passed ;; 124 | 137) status="out of time" ;; *) status=failed ;; esac
    fi
    if [[ $status != passed ]]; then failed=1; fi
    printf '%-10s %-12s %4d s\n' "$name" "$status" "$took"
    if [[ $status == failed ]]; then tail -n 3 "$OUT/$name.log" | sed 's/^/    /'; fi
    entries+=("{\"part\": \"$name\", \"status\": \"$status\", \"code\": $code, \"seconds\": $took}")
done
(IFS=,; printf '[%s]\n' "${entries[*]}") >"$OUT/summary.json"
exit "$failed"
