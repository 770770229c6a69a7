#!/usr/bin/env bash
# Steps 1 and 1.5 of one iteration with the transformers backend: responses to every prompt, gathered into pairs.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: MODEL=... bash scripts/generate.sh ITER [flags of spin/generate.py]

    MODEL          the opponent: model folder or Hub name (required)
    INPUT_DIR      prompts with ground truth (default data/iter0)
    OUTPUT_DIR     fractions are written here (default generated/iterITER)
    PAIRS_DIR      pairs are written here (default pairs/iterITER)
    CONVERT        further flags of spin/convert_data.py, for example "--identical drop"
    SPLITS         splits to generate (default "train test")
    FRAC_LEN       prompts in a fraction (default 0: one fraction)
    FRACS          the fractions this server makes, for example "0 1 2"; then the pairs are left to you (default: all)
    NUM_PROCESSES  processes, one GPU each (default: the number of GPUs, else 1)
    PYTHON         the interpreter (default python)

Killed and started again, it goes on where it stood. Example, two servers that share a disk:
    server A:  MODEL=outputs/iter0 FRAC_LEN=10000 FRACS="0 1 2" bash scripts/generate.sh 1 --max_new_tokens 256
    server B:  MODEL=outputs/iter0 FRAC_LEN=10000 FRACS="3 4"   bash scripts/generate.sh 1 --max_new_tokens 256
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/fractions.sh"
spin_settings "${1:-}"
iteration=$1
shift
cd "$SPIN_ROOT"

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
NUM_PROCESSES=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
launch=("$PYTHON")
if [ "$NUM_PROCESSES" -gt 1 ]; then
    # --multi_gpu is accelerate's word for "start N processes here"; without GPUs they run on the CPU.
    launch=("$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$NUM_PROCESSES" --num_machines 1
        --mixed_precision no --dynamo_backend no --main_process_port 0)
fi
for split in $SPLITS; do
    prompts=$(spin_count_prompts "$split")
    for fraction in $(spin_fractions "$prompts" "$FRAC_LEN"); do
        "${launch[@]}" spin/generate.py --model "$MODEL" --input_dir "$INPUT_DIR" --output_dir "$OUTPUT_DIR" --split "$split" \
            --data_frac "$fraction" --frac_len "$FRAC_LEN" --iteration "$iteration" "$@"
    done
done
spin_convert
