"""The interface of a kind of training; the part they share is :func:`spin.alignment.training.run.train`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spin.alignment.core.provenance import hash_weights
from spin.alignment.training.accounting import Account
from spin.alignment.training.described import Described
from spin.alignment.training.settings import Settings, inputs_record

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.encoded_store import EncodedSplit


@dataclass(frozen=True)
class TrainingData:
    """The encoded splits (``train``, optionally ``test``), the dropped rows as reported in ``metrics.json``, the account of
    each split's rows and tokens, and the hashes of each split's content by name, where they are known.
    """

    splits: dict[str, Any]
    dropped: dict[str, Any]
    accounts: dict[str, Account] = field(default_factory=dict)
    hashes: dict[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, splits: Mapping[str, EncodedSplit]) -> TrainingData:
        """Return the data of a store, with its dropped rows by split and reason."""
        return cls(
            {name: split.rows for name, split in splits.items()},
            {name: dict(split.account.dropped) for name, split in splits.items()},
            {name: split.account for name, split in splits.items()},
            {name: split.hashes for name, split in splits.items()},
        )

    def sizes(self) -> dict[str, int]:
        """Return the number of rows of each split."""
        return {split: len(rows) for split, rows in self.splits.items()}


@dataclass(frozen=True)
class TrainingJob:
    """The validated inputs of one training run, before its model is loaded.

    ``model_key`` identifies the initial weights.
    """

    settings: Settings
    encoder: ChatEncoder
    data: TrainingData
    model_key: str


class TrainingProgram(ABC):
    """One kind of training. Methods are listed in the order they are called; each raises InputError for bad input.

    Attributes:
        script: its program in ``spin/``.
        arguments_class: the TrainingArguments subclass that its keys are parsed into.
        defaults: values of keys that the configuration omits.
    """

    script: ClassVar[str]
    arguments_class: ClassVar[type]
    defaults: ClassVar[Mapping[str, Any]] = {}

    def check_settings(self, settings: Settings) -> None:  # noqa: B027  (most have nothing to check)
        """Check for incompatible settings, before any data is read."""

    def held_out_metrics(self, arguments: Any) -> list[str]:
        """Return the metrics that an evaluation on held-out rows measures, without the prefix ``eval_``."""
        return ["loss"]

    @abstractmethod
    def load_data(self, settings: Settings, encoder: ChatEncoder) -> TrainingData:
        """Read and encode the data."""

    @abstractmethod
    def describe_data(self, data: TrainingData) -> list[str]:
        """Return a human-readable line about each split."""

    def check_data(self, settings: Settings, data: TrainingData, model_folder: Path) -> None:  # noqa: B027
        """Check the data against the model's configuration."""

    def model_key(self, settings: Settings, model_folder: Path) -> str:
        """Return a string that identifies the initial weights."""
        return hash_weights(model_folder)

    @abstractmethod
    def data_key(self, job: TrainingJob) -> str:
        """Return a hash of all data that the training reads."""

    def inputs(self, job: TrainingJob) -> dict[str, Any]:
        """Return everything that determines the result, by hash or value: the contents of ``inputs.json``."""
        record = inputs_record(job.settings, job.model_key, self.data_key(job))
        return record | job.encoder.template_record

    @abstractmethod
    def describe(self, settings: Settings) -> Described:
        """Return what the model card says of the method."""

    def open(self, settings: Settings) -> None:  # noqa: B027
        """Acquire resources besides the policy (such as a scorer), before the policy is loaded."""

    @abstractmethod
    def make_trainer(self, job: TrainingJob, model: Any) -> Any:
        """Return the Trainer for a policy."""

    @abstractmethod
    def metrics(self, job: TrainingJob, trainer: Any, result: Any) -> dict[str, Any]:
        """Return the entries of ``metrics.json`` specific to this kind of training. Called in the main process only."""

    def close(self) -> None:  # noqa: B027
        """Free what :meth:`open` and :meth:`make_trainer` acquired; also called after a failure."""
