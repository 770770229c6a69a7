# Sourced by the other scripts: checks of their arguments and variables. A bad one ends the script with one sentence and exit code 2.
# shellcheck shell=bash

spin_fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# spin_number NAME VALUE LEAST [MOST]: prints a whole number without leading zeros (bash reads 08 as octal).
spin_number() {
    local name=$1 value=$2 least=$3 most=${4:-999999999}
    case "$value" in
        '' | *[!0-9]*) spin_fail "$name is '$value': set it to a whole number from $least up (see -h)" ;;
    esac
    [ "${#value}" -le 12 ] || spin_fail "$name is '$value': set it to at most $most (see -h)"
    value=$((10#$value))
    if [ "$value" -lt "$least" ] || [ "$value" -gt "$most" ]; then
        spin_fail "$name is $value: set it to a whole number from $least to $most (see -h)"
    fi
    echo "$value"
}

# spin_choice NAME VALUE CHOICE...
spin_choice() {
    local name=$1 value=$2 choice
    shift 2
    for choice in "$@"; do
        [ "$value" != "$choice" ] || return 0
    done
    spin_fail "$name is '$value': choose one of $* (see -h)"
}

# spin_names NAME VALUE: VALUE is a list of plain words, none of them a pattern or a path.
spin_names() {
    case "$2" in
        *[!A-Za-z0-9._\ :-]*) spin_fail "$1 is '$2': give names of letters, digits, '.', '_' and '-', separated by spaces (see -h)" ;;
    esac
    [ -n "${2// /}" ] || spin_fail "$1 is empty: name at least one (see -h)"
}

# spin_file NAME VALUE: VALUE is a file that can be read.
spin_file() { [ -f "$2" ] && [ -r "$2" ] || spin_fail "$1 is '$2', which is not a file: give the path of one (see -h)"; }

# spin_prompts VALUE: VALUE, the variable INPUT_DIR, is given. The demo's prompts are no default: they would suit no other model.
spin_prompts() {
    [ -n "$1" ] || spin_fail "set INPUT_DIR to your prompts: a folder, a file or a Hub name (data/iter0 has those of the demo; see -h)"
}

# spin_command NAME VALUE: VALUE can be started.
spin_command() { command -v "$2" >/dev/null 2>&1 || spin_fail "$1 is '$2', which is not installed: set $1 to a command that is (see -h)"; }

# spin_settings ARGUMENT...: every argument is --key=value.
spin_settings() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            --?*=*) ;;
            *) spin_fail "cannot read the argument '$argument': write settings as --key=value (see -h)" ;;
        esac
    done
}

# spin_yaml TEXT: prints the text quoted for YAML, whatever characters a path has.
spin_yaml() { printf "'%s'" "${1//\'/\'\'}"; }

# spin_programs PYTHON: prints the folder of the programs. In a checkout that is spin/; in a folder written by `spin init scripts`, that
# of the installed package.
spin_programs() {
    if [ -f spin/generate.py ]; then
        echo spin
    else
        "$1" -c 'import spin; print(spin.__path__[0])' 2>/dev/null || spin_fail "$1 does not find the package spin: install selfplay-spin"
    fi
}
