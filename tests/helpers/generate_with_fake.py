"""spin/generate.py with a backend that needs no time: for tests and measurements of everything around a model."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator

from spin.alignment.core.program import run_program
from spin.alignment.generation import BACKENDS
from spin.alignment.generation.base import (
    BackendSettings,
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
    sample_seed,
)
from spin.generate import main


class FakeBackend(GenerationBackend):
    """Answers with ids that depend on the seed of the response alone, in an order that depends on nothing of the kind.

    ``FAKE_DELAY`` is the time of a response in seconds, ``FAKE_WINDOW`` the requests in flight.
    """

    def __init__(self, settings: BackendSettings) -> None:
        self.settings = settings
        self.delay = float(os.environ.get("FAKE_DELAY", "0"))
        self.window = int(os.environ.get("FAKE_WINDOW", "16"))
        self.order = random.Random()

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        source = enumerate(requests)
        in_flight: list[tuple[int, PromptRequest]] = []
        exhausted = False
        while in_flight or not exhausted:
            while not exhausted and len(in_flight) < self.window:
                drawn = next(source, None)
                exhausted = drawn is None
                if drawn is not None:
                    in_flight.append(drawn)
            if in_flight:
                index, request = in_flight.pop(self.order.randrange(len(in_flight)))
                if self.delay:
                    time.sleep(self.delay)
                yield index, [self._answer(request, sample, sampling) for sample in range(sampling.num_samples)]

    def _answer(self, request: PromptRequest, sample: int, sampling: SamplingConfig) -> Response:
        numbers = random.Random(sample_seed(sampling.seed, request.prompt_id, sample))
        length = numbers.randint(1, sampling.longest(request))
        ids = numbers.choices(range(10, 60), k=length)
        stops = length < sampling.longest(request)
        return Response([*ids, self.settings.stop_ids[0]] if stops else ids, "stop" if stops else "length")

    def close(self) -> None:
        pass


if __name__ == "__main__":
    BACKENDS["fake"] = FakeBackend
    run_program(main)
