#!/usr/bin/env bash
# Builds the documentation as a site and checks it.
set -euo pipefail
usage() {
    cat <<'TEXT'
usage: bash scripts/docs.sh [FOLDER]

Builds the site into FOLDER (default: build/docs) with mkdocs --strict: a warning is an error. Then checks every link and anchor
of the pages, and that no page asks another host for anything. Needs the packages of the extra `docs`:
    pip install -e ".[docs]"

  PYTHON                  the interpreter (default: python)
  SPIN_DOCS_REPOSITORY    address of the repository, for links to its folders (default: none; they are plain text)

Open FOLDER/index.html, or serve it, which the search needs: python -m http.server -d FOLDER
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
SPIN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/checks.sh
source "$SPIN_ROOT/scripts/checks.sh"
PYTHON=${PYTHON:-python}
spin_command PYTHON "$PYTHON"
"$PYTHON" -c 'import latex2mathml, material, mkdocs' 2>/dev/null ||
    spin_fail "$PYTHON lacks mkdocs-material or latex2mathml: pip install -e '.[docs]'"
folder=$(realpath -m "${1:-$SPIN_ROOT/build/docs}")
cd "$SPIN_ROOT"
# The theme's notice about its successor is not a warning about this site.
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --quiet --strict --site-dir "$folder"
"$PYTHON" docs/site/check_site.py "$folder"
echo "$folder/index.html"
