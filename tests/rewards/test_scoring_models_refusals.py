"""Reward and preference models that cannot score: each is refused with one sentence."""

from __future__ import annotations

import math
import shutil
import sys

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards import ScorerSettings, check_scorer, make_scorer
from tests.helpers import REPOSITORY, char_tokenizer, run_command, save_tiny_model
from tests.helpers.scoring import make_group, save_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("scoring") / "decoder")


def settings(name, folder, **changes):
    return ScorerSettings(name, model=str(folder), **changes)


def test_a_score_that_is_not_finite_names_its_row(decoder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(decoder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file(
        weights | {"score.weight": torch.full_like(weights["score.weight"], math.nan)},
        tmp_path / "m" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        InputError, match=r"returned nan for prompt p1, sample [012]: use another scorer_dtype or model"
    ):
        make_scorer(settings("reward_model", tmp_path / "m")).label([make_group()])


def test_a_model_without_a_trained_head_is_refused(decoder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(decoder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights that its config.json describes .score.weight"):
        make_scorer(settings("reward_model", tmp_path / "m")).label([make_group()])


def test_a_template_that_refuses_names_the_row(tmp_path):
    folder = save_decoder(tmp_path / "m")
    char_tokenizer(template="{{ raise_exception('no system here') }}").save_pretrained(folder)
    with pytest.raises(
        InputError, match=r"prompt p1, sample 0: the chat template of .* rejects the turns 'user, assistant'"
    ):
        make_scorer(settings("reward_model", folder)).label([make_group()])


def test_bad_settings_are_one_sentence_before_anything_is_loaded(decoder, tmp_path):
    two = save_decoder(tmp_path / "two", labels=2)
    causal = save_tiny_model(tmp_path / "causal")
    (tmp_path / "file").touch()
    cases = [
        (
            ScorerSettings("reward_model"),
            "the scorer reward_model needs a model: set scorer_model to the folder or Hub name of a reward model",
        ),
        (ScorerSettings("preference_model"), "set scorer_model to"),
        (settings("reward_model", tmp_path / "none"), "model folder .*none does not exist"),
        (settings("reward_model", two), "two has 2 outputs .num_labels., but a reward model has one"),
        (
            settings("preference_model", causal),
            "is LlamaForCausalLM, not a sequence classifier: give a preference model",
        ),
        (settings("math_answer", decoder), "the scorer math_answer does not read scorer_model: leave it out"),
        (
            settings("reward_model", decoder, base_url="http://x/v1", dtype="bfloat16"),
            "scorer_dtype is bfloat16, but the precision of a running server is fixed",
        ),
        (
            ScorerSettings("judge", base_url="http://x/v1", dtype="bfloat16"),
            "the scorer judge does not read scorer_dtype",
        ),
        (ScorerSettings("math_answer", base_url="http://x/v1"), "does not read base_url: leave it out"),
        (settings("reward_model", causal, base_url="http://x/v1"), "is LlamaForCausalLM, not a sequence classifier"),
        (ScorerSettings("judge"), "the scorer judge needs a running server: set base_url to its address"),
        (ScorerSettings("judge", base_url="nowhere"), "base_url nowhere is not the address of a server"),
        (settings("reward_model", decoder, batch_size=0), "scorer_batch_size is 0: set it to 1 or more"),
        (settings("reward_model", decoder, max_length=0), "scorer_max_length is 0: set it to 1 or more"),
        (settings("reward_model", decoder, dtype="int8"), "scorer_dtype is 'int8': choose one of auto"),
        (settings("reward_model", decoder, cache_dir=str(tmp_path / "file" / "x")), "score_cache .* cannot be written"),
    ]
    for chosen, sentence in cases:
        with pytest.raises(InputError, match=sentence) as caught:
            check_scorer(chosen)
        assert "\n" not in str(caught.value)


def test_checking_rules_loads_no_heavy_library():
    code = (
        "import sys; from spin.alignment.rewards import *; "
        "check_scorer(ScorerSettings('exact_match')); check_scorer(ScorerSettings('math_answer')); "
        "assert not {'torch', 'transformers', 'httpx2'} & set(sys.modules), sorted(sys.modules)"
    )
    done = run_command([sys.executable, "-c", code], timeout=60, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
