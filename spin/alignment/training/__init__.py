"""Training: preference, SFT and online."""

import logging

# On CPUs with bfloat16, bitsandbytes, which transformers imports, recommends another package in a warning.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
