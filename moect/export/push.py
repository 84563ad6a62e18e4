"""Send an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from moect.errors import ExportError


def check_name(name: str) -> None:
    """Whether a repository can have this name, before anything is written for it.

    Raises:
        ExportError: it cannot.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ExportError(f"--push {name}: is no name of a repository; give ORGANISATION/NAME")


def push(folder: Path, name: str, public: bool = False) -> str:
    """Make the repository where need be, private unless asked otherwise, and upload the folder in one commit.

    Args:
        folder: an export.
        name: `ORGANISATION/NAME`.
        public: of a repository that is made now.

    Returns:
        Its address.

    Raises:
        ExportError: the hub refuses, or cannot be reached; the folder is still there.
    """
    from huggingface_hub import HfApi

    check_name(name)
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export of {folder.name} by moect")
    except Exception as error:  # the hub and its network have many ways to say no
        raise ExportError(
            f"--push {name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}; {folder} is written, "
            f"after `hf auth login` send it with: hf upload {name} {folder}"
        ) from error
    return f"{api.endpoint}/{name}"
