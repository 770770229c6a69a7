"""Creates the data of the chat demo, prompts with verifiable instructions; the rows are the same in every run.

python scripts/make_instruction_data.py [OUTPUT_DIR]      (default: data/instructions of this repository)
"""

import sys
from pathlib import Path

from spin.alignment.core.console import say
from spin.alignment.pipeline.demos.instruction_data import write_data

if __name__ == "__main__":
    default = Path(__file__).parent.parent / "data" / "instructions"
    say(write_data(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
