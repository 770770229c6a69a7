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
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/checks.sh
source scripts/checks.sh
iterations=$(spin_number "the first argument, the number of iterations," "${1:-}" 1)
shift
spin_settings "$@"
[ -n "${MODEL:-}" ] || spin_fail "set MODEL to the folder or Hub name of the SFT model (see -h)"
RUN_DIR=${RUN_DIR:-outputs}
export SPLITS=${SPLITS:-train}
export BACKEND=${BACKEND:-transformers}
spin_choice BACKEND "$BACKEND" transformers vllm
[ -z "${CONFIG:-}" ] || spin_file CONFIG "$CONFIG"
read -ra generate_flags <<<"${GENERATE:-}"

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
    # A local opponent has no Hub revision; a Hub model in iteration 0 keeps the one in the configuration.
    revision=()
    [ "$iteration" = 0 ] && [ ! -d "$opponent" ] || revision=(--model_revision=null)
    CONFIG=${CONFIG:-$config} bash scripts/finetune.sh "$iteration" --model_name_or_path="$(spin_yaml "$opponent")" "${revision[@]}" \
        --dataset_mixer="{$mixer}" --output_dir="$(spin_yaml "$folder/checkpoint")" "$@"
    opponent=$folder/checkpoint
done
