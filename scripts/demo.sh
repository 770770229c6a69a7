#!/usr/bin/env bash
# The embedded demo: installs the project, then SFT and three SPIN iterations of a tiny model on two CPU cores.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/demo.sh [RUN_DIR] [--key=value ...]

Makes a virtual environment (SPIN_VENV, default .venv), installs the project and runs configs/demo.yaml into RUN_DIR
(default runs/demo). Killed and started again, it goes on where it stood. Settings go through to `spin run`, for example
    bash scripts/demo.sh runs/seed1 --seed=1
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$SPIN_ROOT/scripts/environment.sh"
cd "$SPIN_ROOT"

run_dir=runs/demo
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    run_dir=$1
    shift
fi
spin_environment ""
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m spin run configs/demo.yaml --run_dir="$run_dir" "$@"
