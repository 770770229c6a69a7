"""The configuration of ``spin run``: one YAML file for all iterations, checked before any process starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.alignment.core.config import build, load_config, merge
from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import INITIAL
from spin.alignment.methods.losses import find_loss
from spin.alignment.methods.weightings import WEIGHTINGS, Compares, Weighting, find_weighting

# What the pipeline itself decides, section by section: these keys may not be written there.
_TRAINING = (
    "model_name_or_path",
    "model_revision",
    "dataset_mixer",
    "dataset_splits",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "seed",
)
MANAGED = {
    "generate": (
        "model",
        "revision",
        "input_dir",
        "output_dir",
        "split",
        "data_frac",
        "iteration",
        "seed",
        "overwrite",
    ),
    "convert": ("input_dir", "output_dir", "num_fracs", "splits", "wait", "initial"),
    "train": _TRAINING,
    "sft": _TRAINING,
    "control": _TRAINING,
    "online": (*_TRAINING, "eval_prompts", "eval_split"),
    "weigh": (
        "input_dir",
        "output_dir",
        "model_minus",
        "revision_minus",
        "tokenizer",
        "revision_tokenizer",
        "page",
        "seed",
        "overwrite",
    ),
    "evaluate": ("model", "revision", "input_dir", "split", "output_file", "seed"),
}
# Which models weigh the tokens when the run trains them, and where they lie in an iteration.
SCORERS_OF_RUN = {"plus": "forward", "minus": "reverse"}
TOKENIZER_FLAGS = ("tokenizer", "revision_tokenizer")
# What one training run of run_online.py takes the place of.
_ITERATED = ("generate", "convert", "weigh", "train", "overrides")


@dataclass(frozen=True)
class RunData:
    """Where prompts with ground truth come from; ``test`` empty means that no model is scored.

    ``prompts`` (default: ``train``) are those the model answers itself: one data set, or a list with one for each iteration. They
    need no ground truth where the pairing needs none.
    """

    train: str
    test: str = ""
    train_split: str = "train"
    test_split: str = "test"
    test_pairs: bool = False
    prompts: str | list[str] = ""
    prompts_split: str = ""

    def played(self, iteration: int = 0) -> tuple[str, str]:
        """Return the data set and the split whose prompts the model answers in an iteration."""
        path = self.prompts[iteration] if isinstance(self.prompts, list) else self.prompts
        return path or self.train, self.prompts_split or self.train_split


@dataclass(frozen=True)
class LaunchConfig:
    """How the GPU programs are started: plain Python for one process without ``config_file``, else accelerate.

    ``parallel`` trains the control and scores models beside the self-play itself, one thread each: for machines with
    cores (or GPU memory) to spare.
    """

    num_processes: int = 1
    config_file: str | None = None
    parallel: bool = False


@dataclass(frozen=True)
class RunConfig:
    """One run: every section but ``data`` and ``launch`` holds the flags or keys of the program it is named after."""

    run_dir: str
    model: str
    data: RunData
    model_revision: str | None = None
    iterations: int = 1
    history: int = 1
    seed: int = 42
    sft: dict[str, Any] | None = None
    control: dict[str, Any] | None = None
    generate: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)
    weigh: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    online: dict[str, Any] | None = None
    overrides: dict[Any, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        for name, lowest in (("iterations", 1), ("history", 0), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise InputError(f"{name} is {getattr(self, name)}: set it to {lowest} or more")
        if self.launch.num_processes < 1:
            raise InputError(f"launch.num_processes is {self.launch.num_processes}: set it to 1 or more")
        if self.launch.config_file and not Path(self.launch.config_file).is_file():
            raise InputError(f"launch.config_file {self.launch.config_file} does not exist: give an accelerate config")
        if self.launch.parallel and (self.launch.num_processes > 1 or self.launch.config_file):
            raise InputError("launch.parallel shares one machine between single processes: set it to false")
        if not self.run_dir or not self.model or not self.data.train:
            raise InputError("run_dir, model and data.train must not be empty: give a folder for each")
        if self.data.test_pairs and not self.data.test:
            raise InputError("data.test_pairs is true but data.test is empty: name the held-out prompts")
        # The training programs tell a held-out split by its name, as the original does.
        for name in ("train_split", "prompts_split"):
            if getattr(self.data, name).startswith("test"):
                raise InputError(
                    f"data.{name} is {getattr(self.data, name)}: a split named test... is never trained on"
                )
        if isinstance(self.data.prompts, list) and len(self.data.prompts) != self.iterations:
            raise InputError(
                f"data.prompts names {len(self.data.prompts)} data sets for {self.iterations} iterations: name one for each, or "
                "a single one"
            )
        if self.data.prompts_split and not self.data.prompts:
            raise InputError("data.prompts_split is set, but data.prompts is not: name the prompts, or use train_split")
        if self.data.test_pairs and not self.data.test_split.startswith("test"):
            raise InputError(f"data.test_split is {self.data.test_split}: name it test... to make held-out pairs of it")
        self._check_sections()

    def _check_sections(self) -> None:
        iterated = [name for name in _ITERATED if getattr(self, name)] + (["iterations"] if self.iterations > 1 else [])
        if self.online is not None and iterated:
            raise InputError(
                f"the section 'online' takes the place of the iterations: remove '{iterated[0]}', or 'online'"
            )
        sections = {name: getattr(self, name) or {} for name in MANAGED}
        for name, section in sections.items():
            managed = [key for key in MANAGED[name] if key in section]
            if managed:
                raise InputError(f"'{managed[0]}' in the section '{name}' is set by the pipeline itself: remove it")
        self._check_weigh(self.weigh)
        for iteration, values in self.overrides.items():
            if not isinstance(iteration, int) or not 0 <= iteration < self.iterations:
                raise InputError(
                    f"overrides names the iteration {iteration!r}, but the run has 0 to {self.iterations - 1}: correct it"
                )
            if not isinstance(values, Mapping):
                raise InputError(f"overrides.{iteration} is not a mapping: write 'key: value' lines under it")
            managed = [key for key in MANAGED["train"] if key in values]
            if managed:
                raise InputError(f"'{managed[0]}' in overrides.{iteration} is set by the pipeline itself: remove it")

    def _check_weigh(self, section: Mapping[str, Any] | None) -> None:
        if section is None:
            return
        if "weighting" not in section:
            raise InputError(
                "the section 'weigh' lacks the key 'weighting': write reverse_dpo, teacher, drift or uniform"
            )
        train = section.get("train")
        if train is not None and not isinstance(train, Mapping):
            raise InputError("weigh.train is not a mapping: write 'key: value' lines under it")
        if train and not self.trains_scorers:
            raise InputError(
                f"weigh.train is for weightings whose models the run trains ({_comparing(Compares.TRAINED)}), but the weighting "
                f"is {section['weighting']}: remove it"
            )
        managed = [key for key in (*MANAGED["train"], "reverse") if key in (train or {})]
        if managed:
            raise InputError(f"'{managed[0]}' in weigh.train is set by the pipeline itself: remove it")
        if self.trains_scorers and ("model_plus" in section or "revision_plus" in section):
            raise InputError(
                f"weigh.model_plus is for {_comparing(Compares.TEACHER)}: the run trains the models of {section['weighting']} "
                "itself, remove it"
            )
        if "reverse" in self.train or any("reverse" in (item or {}) for item in self.overrides.values()):
            raise InputError("'reverse' in the section 'train' would unlearn what is weighed: remove it")

    @property
    def start_model(self) -> str:
        """The model that iteration 0 starts from and plays against."""
        return self.model if self.sft is None else str(Path(self.run_dir) / "sft" / "checkpoint")

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
        """What an iteration trains on: its pairs, with weights where the run has the section ``weigh``."""
        return self.pair_folders(iteration, "pairs" if self.weigh is None else "weights")

    @property
    def trains_scorers(self) -> bool:
        """Whether the models that weigh the tokens are trained by the run itself."""
        return self.weigh is not None and self._weighting.compares is Compares.TRAINED

    @property
    def _weighting(self) -> Weighting:
        return find_weighting(str((self.weigh or {})["weighting"]))

    @property
    def initial_dir(self) -> Path:
        """Where the initial model's responses are, for the losses that read them."""
        return Path(self.run_dir) / INITIAL / "generated"

    @property
    def reads_initial(self) -> bool:
        """Whether a loss of the run reads a response of the model that the first iteration starts from."""
        names = {str(self.train_values(step).get("loss_type", "sigmoid")) for step in range(self.iterations)}
        return self.online is None and any(INITIAL in find_loss(name).responses for name in names)

    def generation_seed(self, iteration: int) -> int:
        """Seeds of different iterations are far apart: the same seed would repeat each prompt's random numbers."""
        return self.seed * 1000 + iteration

    @property
    def initial_seed(self) -> int:
        """The seed of the initial model's responses: not that of the first iteration, whose opponent is the same model."""
        return self.generation_seed(999)

    def train_values(self, iteration: int) -> dict[str, Any]:
        """The complete settings of run_spin.py for an iteration."""
        values = {key: value for key, value in self.train.items() if key != "config"}
        if "config" in self.train:
            # A configuration of one iteration by itself: its model, data and output are the pipeline's business here.
            alone = load_config(str(self.train["config"]))
            values = merge({key: value for key, value in alone.items() if key not in _TRAINING}, values)
        values = merge(values, self.overrides.get(iteration, {}))
        splits = [self.data.played()[1], *([self.data.test_split] if self.data.test_pairs else [])]
        return (
            values
            | self._owned(self.opponent(iteration), self.iteration_dir(iteration))
            | {
                "dataset_mixer": dict.fromkeys(self.train_folders(iteration), 1.0),
                "dataset_splits": [f"{split}_prefs" for split in splits],
            }
        )

    def scorer_values(self, iteration: int, name: str) -> dict[str, Any]:
        """The complete settings of run_spin.py for a model that weighs tokens: ``forward`` (plain SPIN) or ``reverse``."""
        values = {key: value for key, value in self.train_values(iteration).items() if key != "alpha"}
        values |= (self.weigh or {}).get("train") or {}
        values["dataset_mixer"] = dict.fromkeys(self.pair_folders(iteration), 1.0)
        values["output_dir"] = str(self.iteration_dir(iteration) / name / "checkpoint")
        return values | ({"reverse": True} if name == "reverse" else {})

    def weigh_values(self, iteration: int) -> dict[str, Any]:
        """The complete flags of estimate_weights.py for an iteration; sequences are cut as in its training."""
        section = {key: value for key, value in (self.weigh or {}).items() if key != "train"}
        folder, trained, opponent = (
            self.iteration_dir(iteration),
            self.train_values(iteration),
            self.opponent(iteration),
        )
        params = section.get("transform_params") or {}
        if isinstance(params, Mapping):
            section["transform_params"] = [f"{key}={value}" for key, value in params.items()] or None
        models: dict[str, Any]
        if self.trains_scorers:
            models = {f"model_{sign}": str(folder / name / "checkpoint") for sign, name in SCORERS_OF_RUN.items()}
        else:
            with_teacher = self._weighting.compares is Compares.TEACHER
            role = ("model_minus", "revision_minus") if with_teacher else TOKENIZER_FLAGS
            revision = self.model_revision if opponent == self.model else None
            models = {role[0]: opponent, role[1]: revision}
        # What compares no models cuts nothing.
        inherited = ("max_length", "max_prompt_length", "system") if self._weighting.needs_models else ("system",)
        shared: dict[str, Any] = {key: trained[key] for key in inherited if key in trained}
        output = {"output_dir": str(folder / "weights"), "page": str(folder / "weights.html"), "seed": self.seed}
        return {**shared, **section, **models, "input_dir": str(folder / "pairs"), **output}

    def sft_values(self, name: str) -> dict[str, Any]:
        """The complete settings of run_sft.py for the start (``sft``) or the continued-SFT control (``control``)."""
        model = self.model if name == "sft" else self.start_model
        return (
            dict(getattr(self, name))
            | self._owned(model, Path(self.run_dir) / name)
            | {
                "dataset_mixer": {self.data.train: 1.0},
                "dataset_splits": [self.data.train_split],
            }
        )

    def online_values(self) -> dict[str, Any]:
        """The complete settings of run_online.py."""
        section = dict(self.online or {})
        path, split = self.data.played()
        held_out = self.data.test and section.get("eval_strategy", "no") != "no"
        return (
            section
            | self._owned(self.start_model, Path(self.run_dir) / "online")
            | {"dataset_mixer": {path: 1.0}, "dataset_splits": [split]}
            | ({"eval_prompts": self.data.test, "eval_split": self.data.test_split} if held_out else {})
        )

    def _owned(self, model: str, folder: Path) -> dict[str, Any]:
        owned = {"model_name_or_path": model, "output_dir": str(folder / "checkpoint"), "seed": self.seed}
        return owned | ({"model_revision": self.model_revision} if model == self.model and self.model_revision else {})

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_run_config(path: str | Path, arguments: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run, ``--key=value`` on top (dots reach into sections).

    Raises:
        InputError: an unknown key, a value out of range, or a key that the pipeline sets itself.
    """
    values = load_config(path, arguments)
    overrides = values.get("overrides")
    if isinstance(overrides, Mapping):
        values["overrides"] = {int(key) if str(key).isdigit() else key: item for key, item in overrides.items()}
    return build(RunConfig, values, str(path))


def flags(values: Mapping[str, Any]) -> list[str]:
    """Turn a section into command-line flags: true becomes a bare flag, false and null nothing, a list several values."""
    arguments: list[str] = []
    for key, value in values.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{key}")
        if value is not True:
            arguments += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return arguments


def _comparing(what: Compares) -> str:
    return ", ".join(name for name in WEIGHTINGS if find_weighting(name).compares is what)


def open_run(run_dir: str | Path) -> RunConfig:
    """Return the configuration of an existing run directory.

    Raises:
        InputError: the folder holds no run.
    """
    path = Path(run_dir) / "run.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir} holds no run (run.yaml is missing): give the run_dir of `spin run`")
    return load_run_config(path, [f"--run_dir={run_dir}"])
