"""The settings of spin/convert_data.py and spin/select_responses.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, part_of, same_as, setting
from spin.alignment.methods.pairings import find_pairing
from spin.alignment.models.config import Dtype
from spin.alignment.rewards.base import ScorerSettings


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Gather generated fractions into preference parquet files."""

    input_dir: str = setting(
        help="folder of {split}-{fraction}.parquet files from generate.py",
        group="fractions and pairs",
        path="input",
        set_by_run=True,
    )
    output_dir: str = setting(help="folder for {split}_prefs-*.parquet", path="folder", set_by_run=True)
    splits: list[str] = setting([], "splits to gather", unset="those found at the start", path="name", set_by_run=True)
    num_fracs: int = setting(0, "number of training fractions to expect (0: as recorded)", ge=0, set_by_run=True)
    wait: float = setting(
        0.0,
        "gather while fractions are still being generated; stop after this many seconds without a new one (0: do not wait)",
        ge=0,
        set_by_run=True,
    )
    pairing: str = setting(
        "ground_truth", "which response is chosen and which rejected: a name, or module:function", recorded=True
    )
    initial: str | None = setting(
        None,
        "folder of the initial model's responses to the same prompts: a third response, for the losses that read one",
        path="input",
        set_by_run=True,
    )
    identical: Literal["keep", "drop"] = setting("keep", "pairs whose responses are equal", recorded=True)
    truncated: Literal["keep", "drop"] = setting("keep", "truncated responses (no EOS)", recorded=True)
    max_rows_per_file: int = setting(100_000, "rows in one output file", ge=1, recorded=True)
    overwrite: bool = setting(False, "replace pairs that were created from other inputs or settings")

    scorer: str | None = same_as(ScorerSettings, "name", default=None, group="scorer")
    scorer_model: str | None = same_as(ScorerSettings, "model")
    scorer_batch_size: int = same_as(ScorerSettings, "batch_size")
    scorer_max_length: int | None = same_as(ScorerSettings, "max_length")
    scorer_dtype: Dtype = same_as(ScorerSettings, "dtype")
    base_url: str | None = same_as(ScorerSettings, "base_url")
    score_cache: str | None = same_as(ScorerSettings, "cache_dir")
    trust_remote_code: bool = same_as(ScorerSettings, "trust_remote_code")

    def __post_init__(self) -> None:
        check_settings(self)
        find_pairing(self.pairing)

    def check_files(self) -> None:
        """Check the folders that the settings name.

        Raises:
            InputError: the input folder or the folder of initial responses does not exist, or input and output are the same.
        """
        check_folders(self.input_dir, self.output_dir)
        if self.initial is not None and not Path(self.initial).is_dir():
            raise InputError(
                f"initial is {self.initial}, which is not a folder: give the output folder of spin/generate.py"
            )


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Select the generated responses that a scorer accepts, as SFT data."""

    input_dir: str = same_as(ConvertConfig, "input_dir", group="fractions", set_by_run=True)
    output_dir: str = setting(help="folder for {split}.parquet", path="folder", set_by_run=True)
    threshold: float = setting(1.0, "lowest score of a response that is accepted", recorded=True)
    overwrite: bool = setting(False, "replace rows that were selected from other inputs or with other settings")

    scorer: str = same_as(ScorerSettings, "name", group="scorer", recorded=True)
    scorer_model: str | None = same_as(ScorerSettings, "model")
    scorer_batch_size: int = same_as(ScorerSettings, "batch_size")
    scorer_max_length: int | None = same_as(ScorerSettings, "max_length")
    scorer_dtype: Dtype = same_as(ScorerSettings, "dtype")
    base_url: str | None = same_as(ScorerSettings, "base_url")
    score_cache: str | None = same_as(ScorerSettings, "cache_dir")
    trust_remote_code: bool = same_as(ScorerSettings, "trust_remote_code")

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def scorer_settings(self) -> ScorerSettings:
        """The scorer's settings as the rewards package expects them."""
        return part_of(self, ScorerSettings, all_devices=True)

    def check_files(self) -> None:
        """Check the folders that the settings name.

        Raises:
            InputError: the input folder does not exist, or input and output are the same.
        """
        check_folders(self.input_dir, self.output_dir)


def check_folders(input_dir: str, output_dir: str) -> None:
    """Check the folder of the fractions and that of the output.

    Raises:
        InputError: the input folder does not exist, or input and output are the same.
    """
    if not Path(input_dir).is_dir():
        raise InputError(f"input_dir {input_dir} does not exist: give the output folder of spin/generate.py")
    if Path(input_dir).resolve() == Path(output_dir).resolve():
        raise InputError(f"output_dir is the input_dir {input_dir}: choose another folder")
