# Sourced by generate.sh and generate_vllm.sh: the variables both read, and how a split is cut into fractions.

SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}

# spin_settings ITER: check the iteration number, fill in the defaults.
spin_settings() {
    case "${1:-}" in
        '' | *[!0-9]*) echo "error: the first argument must be the iteration number, for example 0 (see -h)" >&2; return 2 ;;
    esac
    if [ -z "${MODEL:-}" ]; then
        echo "error: set MODEL to the opponent's folder or Hub name (see -h)" >&2
        return 2
    fi
    INPUT_DIR=${INPUT_DIR:-data/iter0}
    OUTPUT_DIR=${OUTPUT_DIR:-generated/iter$1}
    PAIRS_DIR=${PAIRS_DIR:-pairs/iter$1}
    SPLITS=${SPLITS:-train test}
    FRAC_LEN=${FRAC_LEN:-0}
}

# spin_count_prompts SPLIT: print how many prompts the split holds.
spin_count_prompts() {
    "$PYTHON" - "$INPUT_DIR" "$1" <<'PROGRAM'
import sys

from spin.alignment.data import load_prompts
from spin.programs import run_program

run_program(lambda arguments: print(len(load_prompts(*arguments))))
PROGRAM
}

# spin_fractions NUM_PROMPTS FRAC_LEN: print the fractions this server makes: FRACS, else all of them.
spin_fractions() {
    if [ -n "${FRACS:-}" ]; then
        echo "$FRACS"
    elif [ "$2" -eq 0 ]; then
        echo 0
    else
        seq -s ' ' 0 $((($1 + $2 - 1) / $2 - 1))
    fi
}

# spin_convert: gather the fractions into pairs, unless other servers make some of them.
spin_convert() {
    if [ -n "${FRACS:-}" ]; then
        echo "fractions $FRACS are done; when all are in $OUTPUT_DIR: $PYTHON spin/convert_data.py --input_dir $OUTPUT_DIR --output_dir $PAIRS_DIR"
    else
        local flags
        read -ra flags <<<"${CONVERT:-}"
        "$PYTHON" spin/convert_data.py --input_dir "$OUTPUT_DIR" --output_dir "$PAIRS_DIR" "${flags[@]}"
    fi
}
