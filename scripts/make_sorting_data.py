"""Creates the data, tokenizer and model configuration of the demos with rewards; the rows are the same in every run.

python scripts/make_sorting_data.py [OUTPUT_DIR]      (default: data/sorting of this repository)
"""

import sys
from pathlib import Path

from spin.alignment.core.console import say
from spin.alignment.pipeline.demos.sorting import write_data

if __name__ == "__main__":
    say(write_data(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "data" / "sorting"))
