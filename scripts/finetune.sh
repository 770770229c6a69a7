#!/usr/bin/env bash
# Step 2 of one iteration: fine-tunes MODEL on the pairs of the iteration, with the paper's settings unless CONFIG names others.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: MODEL=... bash scripts/finetune.sh ITER [--key=value ...]

Trains iteration ITER (0, 1, 2 ...) with spin/run_spin.py. Settings are passed on, for example --learning_rate=1e-7.

  MODEL          the model to train, which also generated the pairs: folder or Hub name (required, unless CONFIG or
                 --model_name_or_path names it)
  REVISION       its revision on the Hub (default: the newest)
  PAIRS_DIR      folders of pairs, separated by spaces (default: pairs/iterITER, from iteration 1 on also that of ITER-1)
  CHECKPOINT_DIR folder for the trained model (default: outputs/iterITER)
  CONFIG         configuration with the model, pairs and settings of the iteration; the variables above override it
                 (default: settings of configs/config.yaml; from iteration 1 on, of configs/config_iterITER.yaml)
  LAUNCH_CONFIG  accelerate configuration (default: configs/deepspeed_zero3.yaml, which 7B needs; `none` starts
                 a single process)
  NUM_PROCESSES  processes, one per GPU (default: as in LAUNCH_CONFIG)
  MAIN_PORT      port of the main process (default: 29500)

Paths are relative to the folder that contains scripts/.
TEXT
}
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/checks.sh
source scripts/checks.sh
iteration=$(spin_number "the first argument, the iteration number," "${1:-}" 0)
shift
spin_settings "$@"
[ -z "${NUM_PROCESSES:-}" ] || NUM_PROCESSES=$(spin_number NUM_PROCESSES "$NUM_PROCESSES" 1 100000)
MAIN_PORT=$(spin_number MAIN_PORT "${MAIN_PORT:-29500}" 0 65535)

config=configs/config.yaml
[ "$iteration" = 0 ] || config=configs/config_iter$iteration.yaml
config=${CONFIG:-$config}
[ -f "$config" ] || spin_fail "$config does not exist: create it (a few lines, see configs/config_iter1.yaml) or set CONFIG"
launch_config=${LAUNCH_CONFIG:-configs/deepspeed_zero3.yaml}
[ "$launch_config" = none ] || spin_file LAUNCH_CONFIG "$launch_config"

# The shipped configurations name the paper's model. It is never trained unless the caller names it too.
named=${MODEL:-}
for argument in "$@"; do
    case "$argument" in --model_name_or_path=?*) named=$argument ;; esac
done
[ -n "$named${CONFIG:-}" ] || spin_fail "set MODEL to the model that generated the pairs, which training starts from (see -h)"
settings=()
[ -z "${MODEL:-}" ] || settings+=(--model_name_or_path="$(spin_yaml "$MODEL")")
# A revision in the configuration belongs to the model that is named there.
[ -z "$named" ] || settings+=(--model_revision="${REVISION:-null}")
if [ -n "${PAIRS_DIR:-}" ]; then
    read -ra folders <<<"$PAIRS_DIR"
    mixer=
    for folder in "${folders[@]}"; do mixer+="${mixer:+, }$(spin_yaml "$folder"): 1.0"; done
    settings+=(--dataset_mixer="{$mixer}")
fi
[ -z "${CHECKPOINT_DIR:-}" ] || settings+=(--output_dir="$(spin_yaml "$CHECKPOINT_DIR")")
programs=$(spin_programs python)
if [ "$launch_config" = none ]; then
    exec python "$programs/run_spin.py" "$config" "${settings[@]}" "$@"
fi
exec accelerate launch --config_file "$launch_config" ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    --main_process_port "$MAIN_PORT" "$programs/run_spin.py" "$config" "${settings[@]}" "$@"
