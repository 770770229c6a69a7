"""Processes that share an engine: prompts go to the first of each group, and every process gets back its own answers."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch.distributed as dist

from spin.alignment.core.errors import InputError
from spin.alignment.training.online.sharers import Sharers, check_can_share


def exchange(rank: int, count: int, folder: str, results) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    sharers = Sharers.of(2)
    found = []
    for turn in range(2):
        own = [f"{rank}.{turn}.{item}" for item in range((rank + turn) % 3)]  # some have none
        together = sharers.gather(own)
        assert bool(together) <= sharers.leads
        answers = sharers.scatter([item.upper() + "!" for item in together])
        found.append(answers == [item + "!" for item in own])
    results.put((rank, sharers.leads, found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_process_gets_its_own_answers(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=exchange, args=(rank, 4, str(tmp_path), results)) for rank in range(4)]
    for child in children:
        child.start()
    found = sorted(results.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    assert found == [(rank, rank % 2 == 0, [True, True]) for rank in range(4)]


def test_groups_must_divide_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    check_can_share(3)
    with pytest.raises(InputError, match="tensor_parallel_size is 4, but the number of training processes"):
        check_can_share(4)
