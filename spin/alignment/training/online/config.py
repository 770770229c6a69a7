"""The settings of online training: those of preference training, plus sampling, labelling and pairing of responses."""

from __future__ import annotations

from dataclasses import dataclass

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.settings import changed_of, check_settings, part_of
from spin.alignment.core.sides import SIDES
from spin.alignment.generation import BACKENDS, find_backend
from spin.alignment.generation.base import SamplingConfig
from spin.alignment.methods.pairings import Pairing, check_num_samples, find_pairing
from spin.alignment.pairs.annotate import check_loss
from spin.alignment.rewards.base import ScorerSettings
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.moving_reference import FIXED
from spin.alignment.training.online.keys import OnlineKeys

# Scorers that compare a response with the other responses to its prompt.
COMPARATIVE = ("judge", "preference_model")


@dataclass
class OnlineConfig(OnlineKeys, SPINConfig):
    """Every key of preference training plus those of the online loop (:class:`OnlineKeys`).

    ``per_device_train_batch_size * gradient_accumulation_steps`` is the number of prompts per process and step here.
    """

    def __post_init__(self) -> None:
        check_settings(self)
        lookup(
            {name: name for name in BACKENDS if find_backend(name).online}, self.backend, "online generation backend"
        )
        self._check_engine()
        if self.max_prompt_length + self.max_new_tokens > self.max_length:
            raise InputError(
                f"max_prompt_length {self.max_prompt_length} plus max_new_tokens {self.max_new_tokens} exceeds max_length "
                f"{self.max_length}: lower one, or raise max_length"
            )
        if self.ref_update_freq < 1 and self.ref_update_freq != FIXED:
            raise InputError(
                f"ref_update_freq is {self.ref_update_freq}: set it to 1 or more, or to {FIXED} for a fixed reference"
            )
        if self.reference_dir:
            raise InputError("reference_dir is set, but online training stores no reference log-probs: remove it")
        if self.alpha and self.ref_update_freq == self.updates_per_batch == 1:
            raise InputError(
                f"alpha is {self.alpha}, but with ref_update_freq 1 and updates_per_batch 1 the reference is the policy itself "
                "and the KL term always 0: raise one of them, or remove alpha"
            )
        if self.reverse:
            raise InputError("reverse is true, but online pairs are created from their labels: remove it")
        self.sampling = part_of(self, SamplingConfig, seed=self.seed)
        self._check_off_policy()
        self._check_method()
        self._check_held_out()
        super().__post_init__()

    def samples_at(self, temperature: float) -> int:
        """Return the number of responses to each held-out prompt at a temperature."""
        return self.eval_samples if temperature else 1

    @property
    def sampled_sides(self) -> tuple[str, ...]:
        """Both sides of a pair, unless one of them is the ground truth: then the rejected one, if it is always the policy's."""
        pairing = find_pairing(self.pairing)
        if not pairing.needs_ground_truth:
            return SIDES
        return SIDES[1:] if pairing.keeps_rows else ()

    def _check_held_out(self) -> None:
        """Check that there are held-out prompts, and a scorer for them, if any of their settings is set."""
        if self.eval_prompts and not self.scorer:
            raise InputError("eval_prompts is set, but there is no scorer to rate the responses: set scorer")
        if not self.eval_prompts and self.eval_strategy != "no":
            raise InputError(
                f"eval_strategy is {self.eval_strategy}, but there are no held-out prompts: set eval_prompts"
            )
        defaults = {"eval_limit": 0, "eval_split": "test", "eval_temperatures": [0.0, 1.0], "eval_samples": 1}
        for name, default in (defaults | {"eval_pass_score": 1.0, "eval_on_start": False}).items():
            if not self.eval_prompts and getattr(self, name) != default:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but there are no held-out prompts: set eval_prompts (in spin run: "
                    f"set eval_strategy), or remove {name}"
                )
        if not self.eval_temperatures or len(set(self.eval_temperatures)) < len(self.eval_temperatures):
            raise InputError(
                f"eval_temperatures is {self.eval_temperatures}: list one or more temperatures, without duplicates"
            )
        if self.eval_samples > 1 and not any(self.eval_temperatures):
            raise InputError(
                f"eval_samples is {self.eval_samples}, but temperature 0 draws the same response every time: add a temperature "
                "above 0 to eval_temperatures, or remove eval_samples"
            )
        if self.eval_prompts and self.scorer in COMPARATIVE and "chosen_score" not in self.needs:
            raise InputError(
                f"eval_prompts is set, but the scorer {self.scorer} compares responses, and the one response to a "
                "held-out prompt has no other to compare with: remove eval_prompts, or score with a rule or a reward model"
            )

    def _check_engine(self) -> None:
        """Check that the settings of an engine or a server fit the backend."""
        for name in ("gpu_memory_utilization", "tensor_parallel_size"):
            value = getattr(self, name)
            if value != getattr(type(self), name) and name not in find_backend(self.backend).takes:
                raise InputError(f"{name} is {value}, but backend {self.backend} does not use it: remove it")
        served = find_backend(self.backend).online == "server"
        if served != bool(self.server_url):
            raise InputError(
                f"backend is {self.backend}, but server_url is not set: set it to the address of the vLLM server that answers"
                if served
                else f"server_url is {self.server_url}, but backend {self.backend} does not use it: remove it"
            )

    def _check_off_policy(self) -> None:
        """Check that the backend can sample while the policy is trained, and that importance weights can be computed."""
        if self.async_steps and self.alpha:
            raise InputError(
                f"async_steps is {self.async_steps} and alpha is {self.alpha}, but the KL term reads the reference during the "
                "updates, when it is already that of the next batch: set one of them to 0"
            )
        if self.async_steps and find_backend(self.backend).online == "own_module":
            others = ", ".join(name for name in BACKENDS if find_backend(name).online in ("engine", "server"))
            raise InputError(
                f"async_steps is {self.async_steps}, but backend {self.backend} samples with the module that is trained, which "
                f"cannot do both at once: set backend to one with weights of its own ({others}), or async_steps to 0"
            )
        changed = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        for name, neutral in changed.items() if self.importance_cap is not None else ():
            if getattr(self, name) != neutral:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but importance_cap needs responses sampled from the model's own "
                    f"distribution, whose log-probs are known: set {name} to {neutral:g}, or remove importance_cap"
                )

    def _check_method(self) -> None:
        """Check that sampling, scorer, pairing and loss are compatible."""
        pairing = find_pairing(self.pairing)
        self.needs = pairing.needs
        self._check_num_samples(pairing)
        if self.needs and not self.scorer:
            raise InputError(f"pairing {self.pairing} compares scores, but no scorer is set: set scorer")
        check_loss(self.pairing, self.loss_type)
        further = [name for name in self.loss.responses if name not in SIDES]
        if further:
            raise InputError(
                f"loss_type {self.loss_type} reads a response '{further[0]}' besides chosen and rejected, which online training "
                "does not sample: choose another loss_type, or train on stored pairs with run_spin.py"
            )
        for name, default in (("baseline", "prompt"), ("soft_mean_b", 1.0)):
            if getattr(self, name) != default and pairing.relative is None:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but pairing {self.pairing} does not use a baseline: remove it"
                )
        given = [name for name in changed_of(self, ScorerSettings) if name != "trust_remote_code"]
        if given and not self.scorer:
            raise InputError(f"{given[0]} is {getattr(self, given[0])}, but no scorer is set: set scorer, or remove it")

    def _check_num_samples(self, pairing: Pairing) -> None:
        """Check the number of responses per prompt; relative to the batch, one may be enough."""
        enough_for_batch = pairing.for_baseline("batch").min_samples
        if self.baseline == "prompt" and enough_for_batch <= self.num_samples < pairing.min_samples:
            raise InputError(
                f"num_samples is {self.num_samples}, but relative to its prompt's mean a response alone always has the reward 0: "
                f"sample {pairing.min_samples} or more, or set baseline: batch"
            )
        check_num_samples(self.pairing, pairing.for_baseline(self.baseline), self.num_samples)

    @property
    def scorer_settings(self) -> ScorerSettings | None:
        """The scorer's settings as the rewards package expects them; None if responses are not scored."""
        if self.scorer is None:
            return None
        return part_of(
            self,
            ScorerSettings,
            # The key also applies to the policy; rules and judges run no such code and would reject it.
            trust_remote_code=self.trust_remote_code and self.scorer in ("reward_model", "preference_model"),
            score_reference="chosen_score" in self.needs,
        )
