#!/usr/bin/env bash
# The embedded demos: installs the project, then trains a small model with one of the methods on two CPU cores.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/demo.sh [chat|spin|online|sppo|wspin] [RUN_DIR] [--key=value ...]

  chat     a real chat model (135M): online DPO, instructions as checks     configs/demo_chat.yaml
  spin     SPIN: SFT and three iterations of self-play (the default)        configs/demo.yaml
  online   online DPO with a checker, on prompts without ground truth       configs/demo_online.yaml
  sppo     SPPO: win rates from a checker, in iterations                    configs/demo_sppo.yaml
  wspin    WSPIN: token weights from a forward and a reverse DPO            configs/demo_wspin.yaml

The chat demo fetches SmolLM2-135M-Instruct (scripts/fetch_smollm2.sh); MODEL names another model folder or a Hub name.
Creates a virtual environment (SPIN_VENV, default .venv), installs the project and runs the demo in RUN_DIR (default
runs/demo, runs/demo_online ...). If it is killed, run the same command again to resume. Settings are passed to `spin run`, for example
    bash scripts/demo.sh online runs/online_seed2 --seed=2
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$SPIN_ROOT/scripts/environment.sh"
source "$SPIN_ROOT/scripts/checks.sh"
cd "$SPIN_ROOT"

method=spin
case "${1:-}" in
    chat | spin | online | sppo | wspin) method=$1; shift ;;
    '' | --* | */*) ;;
    *) spin_fail "there is no demo '$1': choose chat, spin, online, sppo or wspin, or give RUN_DIR as a path with a / (see -h)" ;;
esac
name=demo
[ "$method" = spin ] || name="demo_$method"
run_dir=runs/$name
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    run_dir=$1
    shift
fi
for argument in "$@"; do
    case "$argument" in --?*) ;; *) spin_fail "cannot read the argument '$argument': write settings as --key=value (see -h)" ;; esac
done
if [ "$method" = chat ]; then spin_environment gguf; else spin_environment ""; fi
export TOKENIZERS_PARALLELISM=false
# A MODEL of the chat demo may be a Hub name.
[ "$method" = chat ] && [ -n "${MODEL:-}" ] || export HF_HUB_OFFLINE=1
case "$method" in
    online | sppo) [ -f data/sorting/model/config.json ] || python scripts/make_sorting_data.py ;;
    chat)
        model=$(bash scripts/fetch_smollm2.sh)
        precision=()
        # AVX-512 bf16 (from 2020 on) or AMX; without them, bfloat16 is emulated and slower than float32.
        if grep -qE '^flags.* (avx512_bf16|amx_bf16)( |$)' /proc/cpuinfo 2> /dev/null; then
            echo "this processor computes in bfloat16: the demo uses it"
        else
            echo "this processor has no fast bfloat16: the demo uses float32, which takes longer"
            precision=(--online.bf16=false --control.bf16=false --select.generate.dtype=float32 --evaluate.dtype=float32)
        fi
        set -- --model="$model" ${precision[@]+"${precision[@]}"} "$@"
        ;;
esac
exec python -m spin run "configs/$name.yaml" --run_dir="$run_dir" "$@"
