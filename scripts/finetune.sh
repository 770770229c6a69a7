#!/usr/bin/env bash
# Step 2 of one iteration: fine-tunes on the pairs of configs/config.yaml (iteration 0) or configs/config_iterN.yaml.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/finetune.sh ITER [--key=value ...]

Trains iteration ITER (0, 1, 2 ...) with spin/run_spin.py. Settings are passed on, for example --learning_rate=1e-7.

  CONFIG         configuration (default: configs/config.yaml; from iteration 1 on, configs/config_iterITER.yaml)
  LAUNCH_CONFIG  accelerate configuration (default: configs/deepspeed_zero3.yaml, which 7B needs; `none` starts
                 a single process)
  NUM_PROCESSES  processes, one per GPU (default: as in LAUNCH_CONFIG)
  MAIN_PORT      port of the main process (default: 29500)
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
programs=$(spin_programs python)
if [ "$launch_config" = none ]; then
    exec python "$programs/run_spin.py" "$config" "$@"
fi
exec accelerate launch --config_file "$launch_config" ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    --main_process_port "$MAIN_PORT" "$programs/run_spin.py" "$config" "$@"
