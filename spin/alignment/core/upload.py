"""Uploading to the Hugging Face Hub: chosen files of a folder and nothing else, only when asked; no token is stored."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spin.alignment.core.cards import CARD_FILE
from spin.alignment.core.errors import InputError, reason_of, shown
from spin.alignment.core.files import explained_os_errors, fsync_folder
from spin.alignment.core.paths import check_output_folder

# Beside what a model or a data set consists of.
_DESCRIPTIONS = (CARD_FILE, "LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True)
class Upload:
    """Files of ``folder``, as paths relative to it, and the ``kind`` of repository that they become."""

    folder: Path
    files: tuple[str, ...]
    kind: Literal["model", "dataset"]


def make_upload(folder: Path, files: Iterable[Path], kind: Literal["model", "dataset"]) -> Upload:
    """Return the upload of some files of a folder, with its card and licence if it has them."""
    described = (path for pattern in _DESCRIPTIONS for path in folder.glob(pattern))
    found = (path for path in (*files, *described) if path.is_file() and path.is_relative_to(folder))
    names = {name for path in found if ".." not in (name := path.relative_to(folder).as_posix())}
    return Upload(folder, tuple(sorted(names)), kind)


def check_repository(name: str, where: str) -> None:
    """Check the name of a repository.

    Raises:
        InputError: no repository can have it; ``where`` names the setting.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"{where} is {shown(name)}, which no repository can have ({reason_of(error)}): set it to OWNER/NAME"
        ) from error


def push(
    upload: Upload, repository: str, private: bool | None, token: str | None = None, revision: str | None = None
) -> str:
    """Create the repository unless it exists, and upload the files; return its full name.

    Args:
        private: None: as the owner's settings say.
        token: None: that of the environment (``HF_TOKEN``) or of ``hf auth login``.

    Raises:
        InputError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        name = api.create_repo(repository, private=private, repo_type=upload.kind, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            repo_type=upload.kind,
            folder_path=upload.folder,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in upload.files],
            commit_message="Uploaded by selfplay-spin",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        raise InputError(
            f"{upload.folder} cannot be pushed to {repository} ({reason_of(error)}): check the name, and log in with `hf auth "
            "login` or set HF_TOKEN"
        ) from error
    return name


def write_folder(upload: Upload, out: Path) -> None:
    """Copy the files that would be uploaded to a new folder, which is complete or absent.

    Raises:
        InputError: ``out`` is not new or empty, or cannot be written.
    """
    check_output_folder(out, "--folder")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--folder {out} is not empty: choose a new folder, or remove it")
    staging = out.absolute().with_name(f".{out.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with explained_os_errors(out):
            staging.mkdir(parents=True)
            for name in upload.files:
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(upload.folder / name, staging / name)
                with (staging / name).open("rb") as file:
                    os.fsync(file.fileno())
            staging.replace(out)  # onto nothing or an empty folder
            fsync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
