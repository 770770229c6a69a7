"""The configuration of ``spin run``: one YAML file for all iterations, checked before any process starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spin.alignment.core.config import build, load_config, load_yaml
from spin.alignment.core.errors import InputError
from spin.alignment.core.secrets import refuse_stored_secrets, without_secrets
from spin.alignment.core.settings import check_settings, same_as, set_by_run, setting
from spin.alignment.core.sides import INITIAL
from spin.alignment.data.config import DataConfig
from spin.alignment.data.split_names import is_held_out
from spin.alignment.data.template_date import parse_date
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.methods.weightings import WEIGHTINGS, Compares, Weighting, find_weighting
from spin.alignment.models.config import ModelConfig
from spin.alignment.pairs.config import ConvertConfig, SelectConfig
from spin.alignment.pipeline.run_sections import WIN_RATE, LaunchConfig, RunData, StopConfig
from spin.alignment.token_weights.config import WeightsConfig
from spin.alignment.training.keys import OutputConfig, SFTKeys, SPINKeys
from spin.alignment.training.online.keys import OnlineKeys

C = TypeVar("C")

_TRAINING = (ModelConfig, DataConfig, OutputConfig)
# The settings that a section may contain: those of these classes, and for a training also every key of its arguments class.
SECTIONS: dict[str, tuple[type, ...]] = {
    "sft": (*_TRAINING, SFTKeys),
    "control": (*_TRAINING, SFTKeys),
    "select": (SelectConfig,),
    "generate": (GenerateConfig,),
    "convert": (ConvertConfig,),
    "weigh": (WeightsConfig,),
    "train": (*_TRAINING, SPINKeys),
    "online": (*_TRAINING, SPINKeys, OnlineKeys),
    "evaluate": (EvaluateConfig,),
}
# The models behind the token weights if the run trains them, and their folders in an iteration.
SCORERS_OF_RUN = {"plus": "forward", "minus": "reverse"}
TOKENIZER_FLAGS = ("tokenizer", "revision_tokenizer")
# Sections that a single training of run_online.py replaces.
_ITERATED = ("generate", "convert", "weigh", "train", "overrides")


@dataclass(frozen=True)
class RunConfig:
    """One run: every section except ``data`` and ``launch`` contains the flags or keys of the program that it is named after."""

    run_dir: str = setting(help="folder of the run", group="run", path="folder")
    model: str = setting(
        help="the SFT model that iteration 0 starts from and plays against; with sft: what SFT starts from",
        path="input",
    )
    data: RunData = setting(help="prompts, see below")
    model_revision: str | None = setting(None, "revision of a Hub model")
    iterations: int = setting(1, "number of iterations; raise it later and the run continues", ge=1, le=1000)
    chat_template_kwargs: dict[str, Any] = same_as(
        DataConfig,
        "chat_template_kwargs",
        help="arguments of the chat template in every program of the run, such as enable_thinking: false",
    )
    template_date: str | None = same_as(DataConfig, "template_date", unset="the day of the first start of the run")
    history: int = setting(
        1, "number of earlier iterations whose data is added to that of the current one (the paper: 1)", ge=0
    )
    seed: int = setting(
        42, "of training and of the responses (generation of iteration t uses 1000 * seed + t)", ge=0, lt=2**32
    )
    sft: dict[str, Any] | None = setting(None, "keys of run_sft.py: train the model that iteration 0 starts from")
    control: dict[str, Any] | None = setting(
        None, "keys of run_sft.py: SFT continued from the start model, for comparison"
    )
    select: dict[str, Any] | None = setting(
        None,
        "flags of select_responses.py, and generate: flags of generate.py: the control is trained on the start model's own "
        "responses that a scorer accepts (rejection sampling) instead of data.train",
    )
    generate: dict[str, Any] = setting({}, "flags of generate.py, without the dashes")
    convert: dict[str, Any] = setting({}, "flags of convert_data.py")
    weigh: dict[str, Any] | None = setting(
        None,
        "flags of estimate_weights.py, and train: keys for the models that the run trains to weight tokens (docs/wspin.md)",
    )
    train: dict[str, Any] = setting(
        {}, "keys of run_spin.py; config: FILE starts from the settings of a file such as configs/config.yaml"
    )
    online: dict[str, Any] | None = setting(None, "keys of run_online.py; replaces the iterations and their sections")
    overrides: dict[Any, Any] = setting({}, "keys of run_spin.py for one iteration: {2: {learning_rate: 1.0e-7}}")
    evaluate: dict[str, Any] = setting({}, "flags of evaluate_model.py")
    report_to: str | list[str] = setting(
        [],
        "trackers that get every training, the results of every stage and some responses: tensorboard, wandb, mlflow, trackio "
        "(docs/trackers.md)",
    )
    launch: LaunchConfig = setting(LaunchConfig(), "how the programs are started, see below")
    stop: StopConfig = setting(StopConfig(), "when the run ends before its last iteration, see below")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.template_date is not None:
            parse_date(self.template_date)
        if self.launch.config_file and not Path(self.launch.config_file).is_file():
            raise InputError(f"launch.config_file {self.launch.config_file} does not exist: give an accelerate config")
        if not self.run_dir or not self.model or not self.data.train:
            raise InputError("run_dir, model and data.train must not be empty: give a folder for each")
        if self.data.test_pairs and not self.data.test:
            raise InputError("data.test_pairs is true but data.test is empty: name the held-out prompts")
        # The training programs recognise a held-out split by its name, as the original code does.
        for name in ("train_split", "prompts_split"):
            if is_held_out(getattr(self.data, name)):
                raise InputError(
                    f"data.{name} is {getattr(self.data, name)}: a split of that name is never trained on, rename it"
                )
        if isinstance(self.data.prompts, list) and len(self.data.prompts) != self.iterations:
            raise InputError(
                f"data.prompts names {len(self.data.prompts)} data sets for {self.iterations} iterations: name one for each, or "
                "a single one"
            )
        if self.data.prompts_split and not self.data.prompts:
            raise InputError("data.prompts_split is set, but data.prompts is not: name the prompts, or use train_split")
        if self.data.test_pairs and not is_held_out(self.data.test_split):
            raise InputError(f"data.test_split is {self.data.test_split}: name it test... to make held-out pairs of it")
        self._check_stop()
        self._check_sections()

    def _check_stop(self) -> None:
        if self.stop.when == "never":
            return
        if not self.data.test or self.online is not None:
            raise InputError(
                f"stop.when is {self.stop.when}, which compares iterations on data.test, but there are "
                f"{'no iterations' if self.data.test else 'no held-out prompts'}: set it to never"
            )
        if self.stop.measure == WIN_RATE and self.evaluate.get("win_rate_by") is None:
            raise InputError(f"stop.measure is {WIN_RATE}, but evaluate.win_rate_by is not set: name a scorer there")

    def _check_sections(self) -> None:
        iterated = [name for name in _ITERATED if getattr(self, name)] + (["iterations"] if self.iterations > 1 else [])
        if self.online is not None and iterated:
            raise InputError(f"the section 'online' replaces the iterations: remove '{iterated[0]}', or 'online'")
        for name, classes in SECTIONS.items():
            refuse_set_by_run(getattr(self, name) or {}, classes, f"the section '{name}'")
        self._check_select_section()
        self._check_weights_section(self.weigh)
        for iteration, values in self.overrides.items():
            if not isinstance(iteration, int) or not 0 <= iteration < self.iterations:
                raise InputError(
                    f"overrides names the iteration {iteration!r}, but the run has 0 to {self.iterations - 1}: correct it"
                )
            if not isinstance(values, Mapping):
                raise InputError(f"overrides.{iteration} is not a mapping: write 'key: value' lines under it")
            refuse_set_by_run(values, SECTIONS["train"], f"overrides.{iteration}")

    def _check_select_section(self) -> None:
        sampled = (self.select or {}).get("generate")
        if sampled is not None and not isinstance(sampled, Mapping):
            raise InputError("select.generate is not a mapping: write 'key: value' lines under it")
        refuse_set_by_run(sampled or {}, SECTIONS["generate"], "select.generate")

    def _check_weights_section(self, section: Mapping[str, Any] | None) -> None:
        if section is None:
            return
        if "weighting" not in section:
            raise InputError(
                "the section 'weigh' lacks the key 'weighting': write reverse_dpo, teacher, drift or uniform"
            )
        if self.weighting.compares is Compares.STORED:
            raise InputError(
                f"weigh.weighting is {section['weighting']}, which reads gains that come with pairs, but a run makes its own "
                f"pairs: choose {_comparing(Compares.TRAINED)} or {_comparing(Compares.TEACHER)}"
            )
        train = section.get("train")
        if train is not None and not isinstance(train, Mapping):
            raise InputError("weigh.train is not a mapping: write 'key: value' lines under it")
        if train and not self.trains_scorers:
            raise InputError(
                f"weigh.train is for weightings whose models the run trains ({_comparing(Compares.TRAINED)}), but the weighting "
                f"is {section['weighting']}: remove it"
            )
        refuse_set_by_run(train or {}, SECTIONS["train"], "weigh.train")
        if train and "reverse" in train:
            raise InputError("'reverse' in weigh.train is set by the pipeline itself: remove it")
        if self.trains_scorers and (section.get("model_plus") or section.get("revision_plus")):
            raise InputError(
                f"weigh.model_plus is for {_comparing(Compares.TEACHER)}: the run trains the models of {section['weighting']} "
                "itself, remove it"
            )
        if "reverse" in self.train or any("reverse" in (item or {}) for item in self.overrides.values()):
            raise InputError(
                "'reverse' in the section 'train' would train the policy to prefer the rejected responses: remove it"
            )

    @property
    def template_settings(self) -> dict[str, Any]:
        """What every program is told about the chat template: the settings that are given."""
        given = {"chat_template_kwargs": self.chat_template_kwargs, "template_date": self.template_date}
        return {name: value for name, value in given.items() if value}

    @property
    def start_model(self) -> str:
        """The model that iteration 0 starts from and plays against."""
        return self.model if self.sft is None else str(Path(self.run_dir) / "sft" / "checkpoint")

    @property
    def self_play_iterations(self) -> range:
        """The iterations of generation and training: none if online training replaces them."""
        return range(self.iterations if self.online is None else 0)

    def opponent(self, iteration: int) -> str:
        """The model that generates for an iteration: also what its training starts from."""
        return self.start_model if iteration == 0 else str(self.iteration_dir(iteration - 1) / "checkpoint")

    def iteration_dir(self, iteration: int) -> Path:
        return Path(self.run_dir) / f"iter{iteration}"

    def pair_folders(self, iteration: int, kind: str = "pairs") -> list[str]:
        """The pairs of an iteration: its own and those of the ``history`` iterations before it."""
        first = max(0, iteration - self.history)
        return [str(self.iteration_dir(step) / kind) for step in range(iteration, first - 1, -1)]

    def train_folders(self, iteration: int) -> list[str]:
        """What an iteration trains on: its pairs, with token weights if the run has the section ``weigh``."""
        return self.pair_folders(iteration, "pairs" if self.weigh is None else "weights")

    @property
    def trains_scorers(self) -> bool:
        """Whether the run itself trains the models behind the token weights."""
        return self.weigh is not None and self.weighting.compares is Compares.TRAINED

    @property
    def weighting(self) -> Weighting:
        """The weighting of the section ``weigh``; only with that section."""
        return find_weighting(str((self.weigh or {})["weighting"]))

    @property
    def initial_dir(self) -> Path:
        """The folder of the initial model's responses, for the losses that read them."""
        return Path(self.run_dir) / INITIAL / "generated"

    def generation_seed(self, iteration: int) -> int:
        """Seeds of different iterations are far apart: the same seed would repeat each prompt's random numbers."""
        return self.seed * 1000 + iteration

    @property
    def sample_section(self) -> dict[str, Any]:
        """The flags of generate.py for the responses that the control is trained on if they are accepted."""
        return dict((self.select or {}).get("generate") or {})

    @property
    def sample_seed(self) -> int:
        """The seed of those responses."""
        return self.generation_seed(998)

    @property
    def initial_seed(self) -> int:
        """The seed of the initial model's responses: not that of the first iteration, whose opponent is the same model."""
        return self.generation_seed(999)

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as it is written to ``run.yaml``: without secrets."""
        return without_secrets(dataclasses.asdict(self))


def load_run_config(path: str | Path, arguments: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run, ``--key=value`` on top (dots reach into sections).

    Raises:
        InputError: an unknown key, a value out of range, or a key that the pipeline sets itself.
    """
    return make_run_config(load_config(path, arguments), str(path))


def make_run_config(values: Mapping[str, Any], source: str) -> RunConfig:
    """Build the configuration of a run from its keys; ``source`` names their origin in messages.

    Raises:
        InputError: as :func:`load_run_config`.
    """
    refuse_stored_secrets(values, source)
    overrides = values.get("overrides")
    if isinstance(overrides, Mapping):
        # Keys of YAML and of the command line are text; those of a Python caller may be numbers, which then win.
        numbered = {
            int(key) if str(key).isascii() and str(key).isdecimal() else key: item for key, item in overrides.items()
        }
        if len(numbered) < len({str(key) for key in overrides}):
            raise InputError(f"overrides in {source} names an iteration twice, as in 1 and 01: keep one of them")
        values = {**values, "overrides": numbered}
    return build(RunConfig, values, source)


def refuse_set_by_run(values: Mapping[str, Any], classes: Sequence[type], where: str) -> None:
    """Refuse keys that the run sets itself.

    Raises:
        InputError: naming the key.
    """
    for key in set_by_run(*classes):
        if key in values and key in ("chat_template_kwargs", "template_date"):
            raise InputError(f"'{key}' in {where} is the same in the whole run: set it at the top of the file")
        if key in values:
            raise InputError(f"'{key}' in {where} is set by the pipeline itself: remove it")


def _comparing(what: Compares) -> str:
    return ", ".join(name for name in WEIGHTINGS if find_weighting(name).compares is what)


def open_run(run_dir: str | Path) -> RunConfig:
    """Return the configuration of an existing run directory.

    Raises:
        InputError: the folder contains no run, or its ``run.yaml`` is damaged.
    """
    path = Path(run_dir) / "run.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir} contains no run (run.yaml is missing): give the run_dir of `spin run`")
    try:
        # Where the run is now, not where it was made; and a folder name is text, whatever it would be in YAML.
        return make_run_config({**load_yaml(path), "run_dir": str(run_dir)}, str(path))
    except InputError as error:
        raise InputError(
            f"{error} (`spin run` with the configuration of this run writes {path.name} again and continues)"
        ) from error


# A run writes every setting; a configuration that a user wrote does not have all of these.
_ALWAYS_WRITTEN = {"run_dir", "model", "model_revision", "data", "iterations", "history", "seed", "overrides", "launch"}


def is_run_yaml(path: Path) -> bool:
    """Return whether a file was written by a run, and is not a configuration that a user wrote."""
    try:
        return load_yaml(path).keys() >= _ALWAYS_WRITTEN
    except InputError:
        return False
