"""The registry of contenders: the label of each, how it runs, and in which order it reads the pairs."""

from __future__ import annotations

from functools import partial

from benchmarks import matmul, ours, peers
from benchmarks.contender import Contender

CONTENDERS = {
    "ours": Contender("this project", ours.run),
    "unshared": Contender("ours, prompts not shared", partial(ours.run, share_prompts=False)),
    "unfused": Contender("ours, head not fused", partial(ours.run, fused_head=False)),
    "padded": Contender("ours, padded batches", partial(ours.run, batching="padded")),
    "uncached": Contender("ours, reference every step", ours.run_uncached, cached=False),
    "naive": Contender("uclaml/SPIN semantics", peers.run_naive, cached=False),
    "trl_default": Contender("TRL, defaults", peers.run_trl_default, cached=False),
    "trl_best": Contender("TRL, best settings", peers.run_trl_best),
    "trl_best_grouped": Contender("TRL, best + length groups", peers.run_trl_best, grouped=True),
    matmul.NAME: Contender("matrix products", matmul.run),
}
DEFAULT = ("ours", "naive", "trl_default", "trl_best", "trl_best_grouped", "unshared")
