"""How much each response token counts. One file and one line here for each weighting."""

from spin.alignment.weighting.base import Weighting
from spin.alignment.weighting.uniform import uniform

WEIGHTINGS: dict[str, Weighting] = {
    "uniform": uniform,
}

__all__ = ["WEIGHTINGS", "Weighting"]
