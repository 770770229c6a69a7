#!/usr/bin/env bash
# Runs N iterations with separate launches of generation, pairing and training. `spin run` does the same and more in one program.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: MODEL=... INPUT_DIR=... bash scripts/run_iterations.sh N [--key=value ...]

Runs iterations 0 to N-1: generate.sh (responses, then pairs), finetune.sh, and the evaluation of the new model on held-out prompts;
at the end, `spin report RUN_DIR`. If it is killed, run the same command again to resume: every step recognises its finished output.
Settings (--key=value) are passed to the training of every iteration.

  MODEL      folder or Hub name of the SFT model: initial model and first opponent (required)
  REVISION   its revision on the Hub (default: the newest)
  INPUT_DIR  prompts with ground truth: folder, file or Hub name (required; data/iter0 has those of the demo)
  RUN_DIR    iterations are written to RUN_DIR/iterT/{generated,pairs,checkpoint,eval.json} (default: outputs)
  BACKEND    transformers or vllm (default: transformers)
  GENERATE   further flags of spin/generate.py, for example "--max_new_tokens 256"
  CONVERT    further flags of spin/convert_data.py, for example "--identical drop"
  TEST_SPLIT held-out split of INPUT_DIR (default: test; none: no model is evaluated)
  EVALUATE   further flags of spin/evaluate_model.py, for example "--max_new_tokens 256 --metric math_answer"

and the variables of generate.sh (SPLITS, FRAC_LEN, ENGINES, GPUS ...) and finetune.sh (LAUNCH_CONFIG ...). Iteration t trains
on the pairs of iterations t and t-1 with the settings of configs/config.yaml or configs/config_iterT.yaml. Paths are relative to
the folder that contains scripts/.
TEXT
}
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/checks.sh
source scripts/checks.sh
iterations=$(spin_number "the first argument, the number of iterations," "${1:-}" 1)
shift
spin_settings "$@"
[ -n "${MODEL:-}" ] || spin_fail "set MODEL to the folder or Hub name of the SFT model (see -h)"
RUN_DIR=${RUN_DIR:-outputs}
export REVISION=${REVISION:-}
export SPLITS=${SPLITS:-train}
export BACKEND=${BACKEND:-transformers}
spin_choice BACKEND "$BACKEND" transformers vllm
[ -z "${CONFIG:-}" ] || spin_file CONFIG "$CONFIG"
spin_number ENGINES "${ENGINES:-1}" 1 10000 >/dev/null
TEST_SPLIT=${TEST_SPLIT:-test}
spin_names TEST_SPLIT "$TEST_SPLIT"
spin_prompts "${INPUT_DIR:-}"
read -ra generate_flags <<<"${GENERATE:-}"
read -ra evaluate_flags <<<"${EVALUATE:-}"
programs=$(spin_programs python)

# spin_evaluate MODEL FOLDER: scores a model on the held-out prompts, unless FOLDER has scores that are newer than the model.
spin_evaluate() {
    local model=$1 folder=$2 revision=()
    [ "$TEST_SPLIT" != none ] || return 0
    [ -z "$REVISION" ] || revision=(--revision "$REVISION")
    if [ -f "$folder/eval.json" ] && [ ! "$model/metrics.json" -nt "$folder/eval.json" ]; then return 0; fi
    python "$programs/evaluate_model.py" --backend "$BACKEND" --model "$model" --input_dir "$INPUT_DIR" \
        --split "$TEST_SPLIT" --output_file "$folder/eval.json" "${revision[@]}" "${evaluate_flags[@]}"
}

echo "==> evaluation of the start $MODEL (TEST_SPLIT=none: without evaluations)"
spin_evaluate "$MODEL" "$RUN_DIR/sft"

opponent=$MODEL
for ((iteration = 0; iteration < iterations; iteration++)); do
    folder=$RUN_DIR/iter$iteration
    mixer="$(spin_yaml "$folder/pairs"): 1.0"
    [ "$iteration" = 0 ] || mixer="$mixer, $(spin_yaml "$RUN_DIR/iter$((iteration - 1))/pairs"): 1.0"
    echo "==> iteration $iteration: start and opponent $opponent, data {$mixer}"
    MODEL=$opponent OUTPUT_DIR=$folder/generated PAIRS_DIR=$folder/pairs \
        bash scripts/generate.sh "$iteration" "${generate_flags[@]}"
    config=configs/config_iter$iteration.yaml
    [ -f "$config" ] || config=configs/config.yaml
    MODEL=$opponent CONFIG=${CONFIG:-$config} CHECKPOINT_DIR=$folder/checkpoint PAIRS_DIR='' \
        bash scripts/finetune.sh "$iteration" --dataset_mixer="{$mixer}" "$@"
    opponent=$folder/checkpoint
    REVISION=  # of the start alone
    spin_evaluate "$opponent" "$folder"
done
python -m spin report "$RUN_DIR"
