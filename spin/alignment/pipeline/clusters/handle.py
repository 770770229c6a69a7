"""A task that a cluster has been given, and how it ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Ending:
    """How a task ended, as far as the cluster itself knows.

    Attributes:
        is_success: every machine reported the exit code 0.
        reason: what the cluster says of it otherwise: a lost machine, a cancelled job.
        refusal: what the user has to fix before the task can run at all; "" if it ran.
    """

    is_success: bool
    reason: str = ""
    refusal: str = ""


class Handle(ABC):
    """A task in the hands of a cluster: waiting, running or ended."""

    @abstractmethod
    def poll(self) -> Ending | None:
        """Return how the task ended on all its machines; None while it waits or runs."""

    @abstractmethod
    def cancel(self) -> None:
        """Ask every program of the task to end, as SIGTERM does; does not wait for it."""

    @abstractmethod
    def kill(self) -> None:
        """End every program of the task at once."""
