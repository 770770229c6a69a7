#!/usr/bin/env bash
# Steps 1 and 1.5 of one iteration with vLLM: independent engines, one per GPU, each taking the next fraction when it is free.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: MODEL=... bash scripts/generate_vllm.sh ITER [flags of spin/generate.py]

    MODEL          the opponent: model folder or Hub name (required)
    INPUT_DIR      prompts with ground truth (default data/iter0)
    OUTPUT_DIR     fractions are written here (default generated/iterITER)
    PAIRS_DIR      pairs are written here (default pairs/iterITER)
    CONVERT        further flags of spin/convert_data.py, for example "--identical drop"
    SPLITS         splits to generate (default "train test")
    GPUS           the GPUs to use, for example "0 1 2 3" (default: all; none: one engine on the CPU)
    TENSOR_PARALLEL  GPUs of one engine (default 1)
    FRAC_LEN       prompts in a fraction (default: the prompts of the split divided among the engines)
    FRACS          the fractions this server makes, for example "0 1 2"; needs FRAC_LEN; then the pairs are left to you
    PYTHON         the interpreter (default python)

Engines share nothing, so uneven fractions cannot hang them. Killed and started again, it goes on where it stood.
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/fractions.sh"
given_frac_len=${FRAC_LEN:-}
spin_settings "${1:-}"
ITERATION=$1
shift
cd "$SPIN_ROOT"

if [ -n "${FRACS:-}" ] && [ -z "$given_frac_len" ]; then
    echo "error: FRACS needs FRAC_LEN, the same on every server: set it (see -h)" >&2
    exit 2
fi
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
GPUS=${GPUS:-$([ "$gpus" -gt 0 ] && seq -s ' ' 0 $((gpus - 1)) || true)}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
read -ra devices <<<"$GPUS"
engines=$((${#devices[@]} > 0 ? ${#devices[@]} / TENSOR_PARALLEL : 1))
if [ "$engines" -lt 1 ]; then
    echo "error: TENSOR_PARALLEL is $TENSOR_PARALLEL but GPUS names ${#devices[@]}: lower it" >&2
    exit 2
fi

# One fraction on the GPUs of slot SLOT (set by xargs); the arguments are the fraction and generate.py's further flags.
spin_one_fraction() {
    local fraction=$1
    shift
    if [ -n "$GPUS" ]; then
        local names
        read -ra names <<<"$GPUS"
        CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${names[*]:SLOT*TENSOR_PARALLEL:TENSOR_PARALLEL}")
        export CUDA_VISIBLE_DEVICES
    fi
    "$PYTHON" spin/generate.py --backend vllm --model "$MODEL" --input_dir "$INPUT_DIR" --output_dir "$OUTPUT_DIR" \
        --split "$SPLIT" --data_frac "$fraction" --frac_len "$FRAC_LEN" --iteration "$ITERATION" \
        --tensor_parallel_size "$TENSOR_PARALLEL" "$@"
}
export -f spin_one_fraction
export PYTHON MODEL INPUT_DIR OUTPUT_DIR ITERATION GPUS TENSOR_PARALLEL

for SPLIT in $SPLITS; do
    prompts=$(spin_count_prompts "$SPLIT")
    FRAC_LEN=${given_frac_len:-$(((prompts + engines - 1) / engines))}
    export SPLIT FRAC_LEN
    if ! spin_fractions "$prompts" "$FRAC_LEN" | tr ' ' '\n' |
        xargs -P "$engines" --process-slot-var=SLOT -I FRACTION bash -c 'spin_one_fraction "$@"' fraction FRACTION "$@"; then
        echo "error: a fraction of $SPLIT failed (its message is above): mend the cause and run the same command again" >&2
        exit 1
    fi
done
spin_convert
