"""How good a response is. One file and one line here for each scorer."""

from spin.alignment.scoring.base import Scorer
from spin.alignment.scoring.exact_match import exact_match
from spin.alignment.scoring.math_answer import math_answer

SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "math_answer": math_answer,
}

__all__ = ["SCORERS", "Scorer"]
