"""Which version of this project a machine has: all machines of a run need the same one.

    python -m spin.alignment.core.project_version

prints that of the interpreter that runs it.
"""

from __future__ import annotations

import hashlib
import sys

from spin.alignment.core.assets import PACKAGE
from spin.alignment.core.console import say


def project_version() -> str:
    """Return the version of this project with a hash of its code, which also differs between two commits of one version.

    Both are those on the disk now: code that is changed during a run is changed for every machine that shares it.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        # Not the files of an editor, nor the assets that only an installed package has.
        if path.name.startswith(".") or path.is_relative_to(PACKAGE / "assets"):
            continue
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE)} {len(content)}\n".encode() + content)
    version = sys.modules["spin"].__version__  # imported with every module of it, of which none may import it
    return f"{version} (code {digest.hexdigest()[:8]})"


def difference(own: str, wanted: str) -> str:
    """Return that a machine with the version ``own`` cannot take part in a run of the version ``wanted``; "" if it can."""
    if own == wanted:
        return ""
    return f"has selfplay-spin {own}, but `spin run` is {wanted}: install the same version on every machine"


if __name__ == "__main__":
    say(project_version())
