"""Checks of a scorer's settings before a model is loaded or a server is contacted."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings
from spin.alignment.rewards.base import ScorerSettings
from spin.alignment.rewards.cache import check_cache_dir
from spin.alignment.rewards.classifier import check_classifier_folder
from spin.alignment.rewards.pairrm_checkpoint import check_pairrm, is_pairrm

_CLASSIFIER = ("model", "max_length", "base_url", "dtype", "trust_remote_code")
# The scorer-specific settings that each scorer reads; a rule reads none of them.
_READ = {
    "reward_model": _CLASSIFIER,
    "preference_model": _CLASSIFIER,
    "judge": ("model", "max_length", "base_url"),
}
_FOR_SOME = _CLASSIFIER


def check_scorer_settings(settings: ScorerSettings) -> None:
    """Check the settings of any scorer; its name has already been checked.

    Raises:
        InputError: a setting the scorer does not read, a missing setting, a number out of range, a model of the wrong kind, or
            a folder that is not writable.
    """
    name = settings.name
    for field in fields(settings):
        if (
            field.name in _FOR_SOME
            and field.name not in _READ.get(name, ())
            and getattr(settings, field.name) != field.default
        ):
            readers = ", ".join(sorted(scorer for scorer, read in _READ.items() if field.name in read))
            raise InputError(f"the scorer {name} does not read {_flag(field.name)}: leave it out (it is for {readers})")
    check_settings(settings, _flag)
    check_cache_dir(settings.cache_dir)
    if name == "judge" and not settings.base_url:
        raise InputError(
            "the scorer judge needs a running server: set base_url to its address, such as http://host:port/v1"
        )
    if settings.base_url is not None:
        from spin.alignment.core.server_link import checked_url

        checked_url(settings.base_url)  # its form only; the server is contacted when the scorer is made
    if name in _READ and name != "judge":
        _check_model(settings)


def _flag(field: str) -> str:
    """Return the name of a setting in the programs."""
    return f"scorer_{field}" if field in ("model", "batch_size", "max_length", "dtype") else field


def _check_model(settings: ScorerSettings) -> None:
    """Check the config in a model folder; a Hub name is checked once it has been resolved."""
    kind = settings.name.replace("_", " ")
    if not settings.model:
        raise InputError(
            f"the scorer {settings.name} needs a model: set scorer_model to the folder or Hub name of a {kind}"
        )
    from spin.alignment.models.folder import check_model_path, read_config_file

    check_model_path(settings.model, needs_weights=settings.base_url is None)
    folder = Path(settings.model)
    if not folder.is_dir():
        return
    if settings.base_url is not None:
        from spin.alignment.rewards.served_classifier import check_served_folder

        check_served_folder(folder, settings)
        return
    if settings.name == "preference_model" and is_pairrm(read_config_file(folder)):
        from spin.alignment.rewards.pairrm import check_settings as check_pairrm_settings

        check_pairrm_settings(settings)
        check_pairrm(folder)
        return
    from spin.alignment.models.weights_check import check_model

    check_classifier_folder(folder, kind)
    check_model(folder, "classifier", settings.trust_remote_code)
