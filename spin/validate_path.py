"""``spin validate PATH``: prints every problem of a data set, a model folder or a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spin.alignment.validation import validate
from spin.programs import EXIT_BAD_INPUT, EXIT_DONE, Parser


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="spin validate", description="Check a data set, a model folder or a run against the contract.")
    parser.add_argument("path", help="parquet file, folder of them, model folder or run directory")
    parser.add_argument("--tokenizer", default=None, help="model whose tokenizer made the ids: check them too")
    parser.add_argument("--system", default="keep", choices=("keep", "fold"), help="as given to generate.py")
    options = parser.parse_args(arguments)
    encoder = None
    if options.tokenizer is not None:
        from spin.alignment.chat import ChatEncoder, load_tokenizer

        encoder = ChatEncoder(load_tokenizer(options.tokenizer), options.system)
    checked, problems = validate(Path(options.path), encoder)
    for problem in problems:
        print(problem)
    what = "stages" if (Path(options.path) / "run.yaml").is_file() else "rows or models"
    print(f"{checked} {what} checked, {len(problems)} problems")
    return EXIT_BAD_INPUT if problems else EXIT_DONE
