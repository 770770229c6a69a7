#!/usr/bin/env bash
# Runs N iterations with separate launches of generation, pairing and training. `spin run` does the same and more in one program.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: MODEL=... bash scripts/run_iterations.sh N [--key=value ...]

Runs iterations 0 to N-1: generate.sh (responses, then pairs), then finetune.sh. If it is killed, run the same command again to
resume: every step recognises its finished output. Settings (--key=value) are passed to the training of every iteration.

  MODEL      folder or Hub name of the SFT model: initial model and first opponent (required)
  RUN_DIR    iterations are written to RUN_DIR/iterT/{generated,pairs,checkpoint} (default: outputs)
  BACKEND    transformers or vllm (default: transformers)
  GENERATE   further flags of spin/generate.py, for example "--max_new_tokens 256"
  CONVERT    further flags of spin/convert_data.py, for example "--identical drop"

and the variables of generate.sh (INPUT_DIR, FRAC_LEN, ENGINES, GPUS ...) and finetune.sh (LAUNCH_CONFIG ...). Iteration t trains
on the pairs of iterations t and t-1 with the settings of configs/config.yaml or configs/config_iterT.yaml.
TEXT
}
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    '' | *[!0-9]*) usage >&2; exit 2 ;;
esac
iterations=$1
shift
if [ -z "${MODEL:-}" ]; then
    echo "error: set MODEL to the folder or Hub name of the SFT model (see -h)" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUN_DIR=${RUN_DIR:-outputs}
export SPLITS=${SPLITS:-train}
export BACKEND=${BACKEND:-transformers}
case "$BACKEND" in
    transformers | vllm) ;;
    *) echo "error: BACKEND is $BACKEND: set it to transformers or vllm" >&2; exit 2 ;;
esac
read -ra generate_flags <<<"${GENERATE:-}"

opponent=$MODEL
for ((iteration = 0; iteration < iterations; iteration++)); do
    folder=$RUN_DIR/iter$iteration
    mixer="$folder/pairs: 1.0"
    [ "$iteration" = 0 ] || mixer="$mixer, $RUN_DIR/iter$((iteration - 1))/pairs: 1.0"
    echo "==> iteration $iteration: start and opponent $opponent, data {$mixer}"
    MODEL=$opponent OUTPUT_DIR=$folder/generated PAIRS_DIR=$folder/pairs \
        bash scripts/generate.sh "$iteration" "${generate_flags[@]}"
    config=configs/config_iter$iteration.yaml
    [ -f "$config" ] || config=configs/config.yaml
    # A local opponent has no Hub revision; a Hub model in iteration 0 keeps the one in the configuration.
    revision=()
    [ "$iteration" = 0 ] && [ ! -d "$opponent" ] || revision=(--model_revision=null)
    CONFIG=${CONFIG:-$config} bash scripts/finetune.sh "$iteration" --model_name_or_path="$opponent" "${revision[@]}" \
        --dataset_mixer="{$mixer}" --output_dir="$folder/checkpoint" "$@"
    opponent=$folder/checkpoint
done
