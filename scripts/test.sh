#!/usr/bin/env bash
# Runs lint, type checks and the whole test suite in a virtual environment.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/test.sh [pytest arguments]

Creates a virtual environment (SPIN_VENV, default .venv), installs the project with its test extras and vLLM, then runs
ruff, mypy and pytest. If vLLM cannot be installed, its tests are skipped with a reason; SPIN_TEST_VLLM=1 makes that an
error, SPIN_TEST_VLLM=0 skips the installation. SmolLM2-135M-Instruct is fetched (scripts/fetch_smollm2.sh); if that is not
possible, the tests that need it are skipped with a reason. SPIN_TEST_SMOLLM2=FOLDER makes that an error, and SPIN_TEST_SMOLLM2=0
skips the download. Test files are distributed over SPIN_TEST_WORKERS processes (default 2). Without arguments, the tests of
lm-evaluation-harness and Trackio follow in an environment of their own (scripts/test_extras.sh); SPIN_TEST_EXTRAS=0 leaves them out,
and with SPIN_TEST_EXTRAS=1 it is an error if these packages cannot be installed.
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$SPIN_ROOT/scripts/environment.sh"
source "$SPIN_ROOT/scripts/checks.sh"
cd "$SPIN_ROOT"
spin_choice SPIN_TEST_VLLM "${SPIN_TEST_VLLM:-auto}" 0 1 auto
spin_choice SPIN_TEST_EXTRAS "${SPIN_TEST_EXTRAS:-auto}" 0 1 auto
[ "${SPIN_TEST_WORKERS:-2}" = auto ] || spin_number SPIN_TEST_WORKERS "${SPIN_TEST_WORKERS:-2}" 0 1000 >/dev/null

spin_environment dev
if [ "${SPIN_TEST_VLLM:-auto}" != 0 ] && ! spin_install_vllm && [ "${SPIN_TEST_VLLM:-auto}" = 1 ]; then
    exit 1
fi
if [ "${SPIN_TEST_SMOLLM2:-}" != 0 ]; then
    if smollm2=$(MODEL='' bash scripts/fetch_smollm2.sh "${SPIN_TEST_SMOLLM2:-models/SmolLM2-135M-Instruct}"); then
        export SPIN_TEST_SMOLLM2=$smollm2
    elif [ -n "${SPIN_TEST_SMOLLM2:-}" ]; then
        exit 1
    fi
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff check .
ruff format --check .
mypy
python -m pytest -n "${SPIN_TEST_WORKERS:-2}" --dist loadfile "$@"
if [ $# -eq 0 ] && [ "${SPIN_TEST_EXTRAS:-auto}" != 0 ]; then
    bash scripts/test_extras.sh
fi
