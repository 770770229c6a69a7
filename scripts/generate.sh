#!/usr/bin/env bash
# Steps 1 and 1.5 of one iteration: generates responses to every prompt with one engine per GPU, and gathers them into pairs.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: MODEL=... INPUT_DIR=... bash scripts/generate.sh ITER [flags of spin/generate.py]

    MODEL          the opponent: model folder or Hub name (required)
    REVISION       its revision on the Hub (default: the newest)
    BACKEND        transformers, vllm or openai (default transformers)
    INPUT_DIR      prompts with ground truth: folder, file or Hub name (required; data/iter0 has those of the demo)
    OUTPUT_DIR     folder for the fractions (default generated/iterITER)
    PAIRS_DIR      folder for the pairs (default pairs/iterITER)
    SPLITS         splits to generate (default "train test")
    FRAC_LEN       prompts in a fraction, the same on every server (default 10000; 0: one fraction)
    GPUS           the GPUs to use, for example "0 1 2 3" (default: all)
    TENSOR_PARALLEL  GPUs of one engine (default 1; vllm)
    ENGINES        engines without GPUs, or clients of a server (default 1)
    GATHER         1: gather the pairs when all fractions are complete; 0: leave that to another server (default 1)
    CONVERT        further flags of spin/convert_data.py, for example "--identical drop"
    PYTHON         the interpreter (default python)

Paths are relative to the folder that contains scripts/.

Every engine is a separate process that takes work nobody has claimed, so no engine waits for a slower one. Any number of servers
may run this with a shared OUTPUT_DIR, at any time. If it is killed, run the same command again to resume. With two servers:

    server A:  MODEL=outputs/iter0 INPUT_DIR=data/mine OUTPUT_DIR=/shared/iter1 bash scripts/generate.sh 1 --max_new_tokens 256
    server B:  MODEL=outputs/iter0 INPUT_DIR=data/mine OUTPUT_DIR=/shared/iter1 GATHER=0 bash scripts/generate.sh 1 --max_new_tokens 256
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/checks.sh
source "$SPIN_ROOT/scripts/checks.sh"
iteration=$(spin_number "the first argument, the iteration number," "${1:-}" 0)
shift
[ -n "${MODEL:-}" ] || spin_fail "set MODEL to the opponent's folder or Hub name (see -h)"
PYTHON=${PYTHON:-python}
BACKEND=${BACKEND:-transformers}
OUTPUT_DIR=${OUTPUT_DIR:-generated/iter$iteration}
PAIRS_DIR=${PAIRS_DIR:-pairs/iter$iteration}
SPLITS=${SPLITS:-train test}
GATHER=${GATHER:-1}
FRAC_LEN=$(spin_number FRAC_LEN "${FRAC_LEN:-10000}" 0)
TENSOR_PARALLEL=$(spin_number TENSOR_PARALLEL "${TENSOR_PARALLEL:-1}" 1)
engines=$(spin_number ENGINES "${ENGINES:-1}" 1 10000)
spin_choice BACKEND "$BACKEND" transformers vllm openai
spin_choice GATHER "$GATHER" 0 1
spin_names SPLITS "$SPLITS"
[ -z "${GPUS:-}" ] || spin_names GPUS "$GPUS"
spin_command PYTHON "$PYTHON"
spin_prompts "${INPUT_DIR:-}"
read -ra splits <<<"$SPLITS"
cd "$SPIN_ROOT"
programs=$(spin_programs "$PYTHON")

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
GPUS=${GPUS-$([ "$gpus" -gt 0 ] && seq -s ' ' 0 $((gpus - 1)) || true)}
read -ra devices <<<"$GPUS"
if [ "${#devices[@]}" -gt 0 ] && [ "$BACKEND" != openai ]; then
    engines=$((${#devices[@]} / TENSOR_PARALLEL))
fi
if [ "$engines" -lt 1 ]; then
    spin_fail "TENSOR_PARALLEL is $TENSOR_PARALLEL but GPUS names ${#devices[@]}: lower it"
fi

pids=()
spin_end_engines() { [ "${#pids[@]}" -eq 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap 'spin_end_engines; wait; exit 130' INT TERM

# spin_start_engine NUMBER SPLIT FLAGS: starts one engine in the background, on its own GPUs if there are any.
spin_start_engine() {
    local number=$1 split=$2
    shift 2
    (
        if [ "${#devices[@]}" -gt 0 ]; then
            CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]:number*TENSOR_PARALLEL:TENSOR_PARALLEL}")
            export CUDA_VISIBLE_DEVICES
        fi
        [ -z "${REVISION:-}" ] || set -- --revision "$REVISION" "$@"
        [ "$TENSOR_PARALLEL" -eq 1 ] || set -- --tensor_parallel_size "$TENSOR_PARALLEL" "$@"
        exec "$PYTHON" "$programs/generate.py" --backend "$BACKEND" --model "$MODEL" --input_dir "$INPUT_DIR" --split "$split" \
            --output_dir "$OUTPUT_DIR" --data_frac auto --frac_len "$FRAC_LEN" --iteration "$iteration" "$@"
    ) &
    pids+=($!)
}

for split in "${splits[@]}"; do
    pids=()
    for ((number = 0; number < engines; number++)); do
        spin_start_engine "$number" "$split" "$@"
    done
    done_engines=0 code=0
    for pid in "${pids[@]}"; do
        if wait "$pid"; then done_engines=$((done_engines + 1)); else code=$?; fi
    done
    # An engine succeeds only when every fraction is complete, no matter which worker generated it.
    if [ "$done_engines" -eq 0 ]; then
        echo "error: every engine of $split failed: fix the problem reported above and run the same command again" >&2
        exit "$code"
    elif [ "$code" -ne 0 ]; then
        echo "warning: $((engines - done_engines)) of $engines engines of $split failed (see above); the others completed the work" >&2
    fi
done
if [ "$GATHER" = 0 ]; then
    echo "all fractions are in $OUTPUT_DIR; to gather them: $PYTHON $programs/convert_data.py --input_dir $OUTPUT_DIR --output_dir $PAIRS_DIR"
else
    read -ra flags <<<"${CONVERT:-}"
    "$PYTHON" "$programs/convert_data.py" --input_dir "$OUTPUT_DIR" --output_dir "$PAIRS_DIR" "${flags[@]}"
fi
