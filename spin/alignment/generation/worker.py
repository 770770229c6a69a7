"""The main loop of generation: claim prompts, stream them through the backend, write finished rows, merge fractions.

Any number of workers can run on one folder, each in its own process with its own engine. They coordinate only through lease
files, so no worker can hang waiting for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import read_provenance
from spin.alignment.data.fractions import PARTS_FOLDER, fraction_path, fraction_size
from spin.alignment.generation.base import GenerationBackend, PromptRequest, Response
from spin.alignment.generation.fraction_work import (
    EncodedPrompts,
    FinishedPrompts,
    FractionWork,
    GenerationJob,
    check_finite,
)
from spin.alignment.generation.leases import Leases, Worker
from spin.alignment.generation.progress import GenerationProgress

FLUSH_SECONDS = 60.0
POLL_SECONDS = 1.0
_REPORT_SECONDS = 15.0
_SKIPPED_SHOWN = 5


@dataclass
class _Unwritten:
    """Responses of one fraction that have not been written yet, by position."""

    work: FractionWork
    responses: dict[int, list[Response]] = field(default_factory=dict)


class GenerationRun:
    """One worker's share of generating some fractions."""

    def __init__(
        self,
        job: GenerationJob,
        fractions: Sequence[int],
        worker: Worker,
        load_backend: Callable[[Sequence[PromptRequest]], GenerationBackend],
        flush_every: int,
        progress: GenerationProgress,
    ) -> None:
        """``load_backend`` is called once, with the prompts of the first fraction, if there is anything to generate."""
        self.job, self.worker, self.progress = job, worker, progress
        self.flush_every, self._load_backend = flush_every, load_backend
        self._unmerged = list(fractions)
        self._total = sum(self._size(number) for number in fractions)
        self._works: dict[int, FractionWork] = {}
        # One lease per fraction, only to spread workers over fractions; blocks within a fraction have their own.
        self._leases = Leases(job.output_dir / PARTS_FOLDER, worker, job.lease_timeout)
        self._backend: GenerationBackend | None = None
        self._unwritten: dict[int, _Unwritten] = {}
        self._flushed = time.monotonic()
        # One thread each for writing parts and for encoding the next fraction, so that the engine never waits for either.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._write: Future[None] | None = None
        self._ahead: dict[int, Future[EncodedPrompts]] = {}
        self._streaming = self.stopping = False

    def stop(self) -> None:
        """Finish requests in flight, write them and raise KeyboardInterrupt; if called twice, or before the start, at once."""
        if self.stopping or not self._streaming:  # nothing in flight, or the user insists
            raise KeyboardInterrupt
        self.stopping = True
        say_error("interrupted: finishing the responses in flight")

    def run(self) -> None:
        """Work until every requested fraction has been merged, by this or another worker.

        Raises:
            InputError: an error the user has to fix; everything flushed is kept.
            KeyboardInterrupt: after :meth:`stop`.
        """
        try:
            waited_since = time.monotonic()
            while True:
                made = self._stream_claims()
                self._settle()
                if self.stopping:
                    raise KeyboardInterrupt
                self._merge_complete()
                if not self._unmerged:
                    return
                if not made:
                    waited_since = self._wait(waited_since)
                for work in self._works.values():
                    work.look_again()
        finally:
            self._close()

    def _close(self) -> None:
        """Write finished rows, also after an error or an interrupt."""
        try:
            self._settle()
        finally:
            self._writer.shutdown()
            self._reader.shutdown(cancel_futures=True)
            if self._backend is not None:
                self.progress.close(self._finished())
                self._backend.close()

    def _stream_claims(self) -> bool:
        """Generate everything that can be claimed now; return whether anything could."""
        drawn: dict[int, tuple[FractionWork, int]] = {}  # request in flight -> its fraction and position
        requests = self._claimed_requests(drawn)
        first = next(requests, None)
        if first is None:
            return False
        # Loaded only once there is work: a rerun on complete fractions must not load a model.
        if self._backend is None:
            self._backend = self._load_backend(drawn[0][0].prompts.requests)
            self.progress.start(self._finished(), self._total)
        self._streaming = True
        stream = self._backend.stream(chain([first], requests), self.job.sampling)
        try:
            for index, responses in stream:
                self._take(*drawn.pop(index), responses)
        except Exception as error:
            # An engine that received the same signal may fail; the rows it finished are still written.
            if not self.stopping or isinstance(error, InputError):
                raise
            say_error(f"the engine stopped ({type(error).__name__})")
        finally:
            self._streaming = False
        return True

    def _take(self, work: FractionWork, position: int, responses: list[Response]) -> None:
        if self.job.sampling.logprobs:
            check_finite(work.prompts.requests[position].prompt_id, responses)
        if work.number not in self._unwritten:
            self._unwritten[work.number] = _Unwritten(work)
        self._unwritten[work.number].responses[position] = responses
        self.progress.add(responses)
        count = sum([len(item.responses) for item in self._unwritten.values()])
        # By time as well, so that slow responses are not lost in a kill.
        if count >= self.flush_every or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()
        if self.progress.show(lambda: self._finished() + count):
            self._tell_others()

    def _claimed_requests(self, drawn: dict[int, tuple[FractionWork, int]]) -> Iterator[PromptRequest]:
        """Claim blocks and yield their requests one by one, recording in ``drawn`` which prompt each of them is."""
        count = 0
        for work in self._open_fractions():
            for position in chain.from_iterable(work.claims()):
                if self.stopping:
                    return
                drawn[count] = work, position
                count += 1
                yield work.prompts.requests[position]

    def _open_fractions(self) -> Iterator[FractionWork]:
        """Yield fractions that no worker has claimed, then those of other workers, whose remaining blocks are shared."""
        others = []
        for number in list(self._unmerged):
            if number in self._works or len(self._unmerged) == 1 or self._leases.claim(self._lease(number)):
                if work := self._open(number):
                    yield work
            else:
                others.append(number)
        for number in others:
            if work := self._open(number):
                yield work

    def _lease(self, number: int) -> str:
        return f"{self.job.split}-{number:05d}"

    def _open(self, number: int) -> FractionWork | None:
        """Open a fraction and start encoding the next one; None if it has already been merged."""
        # Merged fractions are dropped immediately: memory must not grow with the number of fractions.
        for done in [work.number for work in self._works.values() if work.merged]:
            self._forget(done)
        if number not in self._unmerged:
            return None
        if number not in self._works:
            if self._is_merged_by_others(number):
                self._forget(number)
                return None
            ahead = self._ahead.pop(number, None)
            prompts = ahead.result() if ahead is not None else None
            work = self._works[number] = FractionWork(self.job, number, self.worker, prompts)
            for path in work.journal.torn:
                say_error(f"{path} is damaged: skipped, its prompts will be generated again")
            if work.merged:
                self._forget(number)
                return None
        self._encode_ahead(number)
        return self._works[number]

    def _is_merged_by_others(self, number: int) -> bool:
        """Return whether a fraction that this worker has not opened has been merged."""
        path = fraction_path(self.job.output_dir, self.job.split, number)
        if not path.exists():
            return False
        return not self.job.provenance.differences(read_provenance(open_parquet(path).schema_arrow, path))

    def _forget(self, number: int) -> None:
        self._unmerged.remove(number)
        self._works.pop(number, None)
        self._leases.release(self._lease(number))

    @cached_property
    def _readers_job(self) -> GenerationJob:
        return self.job.for_another_thread()

    def _encode_ahead(self, number: int) -> None:
        """Encode the fraction that this worker would claim next, while the current one is generated."""
        for other in self._unmerged:
            if other <= number or other in self._works:
                continue
            owner = self._leases.owner(self._lease(other))
            if owner is None or not self._leases.is_alive(owner):
                if other not in self._ahead:
                    self._ahead = {other: self._reader.submit(self._readers_job.encode, other)}
                return

    def _finished(self) -> int:
        """Return how many of the requested prompts are in files, written by any worker, as far as this worker knows."""
        unmerged = sum(self._size(number) for number in self._unmerged)
        opened = sum(int(work.journal.finished.sum()) + len(work.prompts.skipped) for work in self._works.values())
        return self._total - unmerged + opened

    def _size(self, number: int) -> int:
        return fraction_size(len(self.job.store), number, self.job.frac_len)

    def _flush(self) -> None:
        """Pass the finished prompts to the writer thread, after it has written the previous ones."""
        self._wait_for_writer()  # also raises what the writer raised, for instance a full disk
        batch, self._unwritten = self._unwritten, {}
        self._flushed = time.monotonic()
        self._tell_others()
        if batch:
            # Decoded in this thread, because tokenizers are not thread-safe.
            decoded = [(item.work, item.work.finish(item.responses)) for item in batch.values()]
            self._write = self._writer.submit(self._write_parts, decoded)

    def _tell_others(self) -> None:
        self.worker.tell(split=self.job.split, fractions=sorted(self._works), **self.progress.facts())

    def _write_parts(self, batch: list[tuple[FractionWork, FinishedPrompts]]) -> None:
        for work, finished in batch:
            work.write(self.worker.name, finished)
            self._merge(work)

    def _merge(self, work: FractionWork) -> None:
        if not work.merge_if_complete():
            return
        skipped = work.prompts.skipped
        for item in skipped[:_SKIPPED_SHOWN]:
            say_error(f"skipped prompt {item['prompt_id']}: {item['reason']}")
        if skipped[_SKIPPED_SHOWN:]:
            say_error(f"skipped {len(skipped)} prompts in total; they are listed in the file's metadata")
        say_error(f"wrote {work.journal.path}")

    def _wait_for_writer(self) -> None:
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def _settle(self) -> None:
        """Write all finished rows and wait until they are on disk."""
        if self._unwritten:
            self._flush()
        self._wait_for_writer()

    def _merge_complete(self) -> None:
        """Merge complete fractions and forget merged ones."""
        for number in list(self._unmerged):
            work = self._works.get(number)
            if work is not None and not work.merged and work.journal.accepts_parts():
                work.journal.scan()
                self._merge(work)
            if (work is not None and work.merged) or self._is_merged_by_others(number):
                self._forget(number)

    def _wait(self, since: float) -> float:
        """Sleep while other live workers hold all remaining blocks; report it every few seconds."""
        if time.monotonic() - since > _REPORT_SECONDS:
            since = time.monotonic()
            numbers = ", ".join(map(str, self._unmerged[:5]))
            say_error(f"waiting for other workers to finish fraction {numbers}")
        time.sleep(POLL_SECONDS)
        return since
