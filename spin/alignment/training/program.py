"""What is special to a kind of training; what they share is :func:`spin.alignment.training.run.train`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spin.alignment.core.provenance import hash_weights
from spin.alignment.training.settings import Settings, inputs_record

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder


@dataclass(frozen=True)
class TrainingData:
    """The encoded splits (``train``, and ``test`` where there is one), and what was dropped, as metrics.json reports it."""

    splits: dict[str, Any]
    dropped: dict[str, Any]

    def sizes(self) -> dict[str, int]:
        """Return the number of rows of each split."""
        return {split: len(rows) for split, rows in self.splits.items()}


@dataclass(frozen=True)
class TrainingJob:
    """Everything that one training starts from, checked, before its model is loaded.

    ``model_key`` identifies the weights that it starts from.
    """

    settings: Settings
    encoder: ChatEncoder
    data: TrainingData
    model_key: str


class TrainingProgram(ABC):
    """One kind of training, in the order in which its methods are called. Each raises InputError for bad input.

    Attributes:
        arguments_class: the TrainingArguments that its keys are read into.
        defaults: values of keys that the configuration leaves out.
    """

    arguments_class: ClassVar[type]
    defaults: ClassVar[Mapping[str, Any]] = {}

    def check_settings(self, settings: Settings) -> None:  # noqa: B027  (most have nothing to check)
        """Check settings that do not go together, before anything is read."""

    @abstractmethod
    def load_data(self, settings: Settings, encoder: ChatEncoder) -> TrainingData:
        """Read and encode the data."""

    @abstractmethod
    def describe_data(self, data: TrainingData) -> list[str]:
        """Return a line for people about each split."""

    def check_data(self, settings: Settings, data: TrainingData, model_folder: Path) -> None:  # noqa: B027
        """Check the data against the model's configuration."""

    def model_key(self, settings: Settings, model_folder: Path) -> str:
        """Return what identifies the weights that the training starts from."""
        return hash_weights(model_folder)

    @abstractmethod
    def data_key(self, job: TrainingJob) -> str:
        """Return a hash of all that is read of the data."""

    def inputs(self, job: TrainingJob) -> dict[str, Any]:
        """Return what decides the result, by hash or value: the content of ``inputs.json``."""
        return inputs_record(job.settings, job.model_key, self.data_key(job))

    def open(self, settings: Settings) -> None:  # noqa: B027
        """Acquire what the training needs beside the policy, before that is loaded."""

    @abstractmethod
    def make_trainer(self, job: TrainingJob, model: Any) -> Any:
        """Return the Trainer of a policy."""

    @abstractmethod
    def metrics(self, job: TrainingJob, trainer: Any, result: Any) -> dict[str, Any]:
        """Return what metrics.json says beside what every training does. Called in the main process."""

    def close(self) -> None:  # noqa: B027
        """Free what :meth:`open` and :meth:`make_trainer` acquired; called however the training ended."""
