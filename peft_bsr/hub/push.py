"""Uploading an adapter to the Hub with its model card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from peft import PeftModel

from peft_bsr.hub.facts import add_facts

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    image_processor: BaseImageProcessor | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload the model's adapters and the model card.

    The root of the repository, which `peft_bsr.load` reads, is the adapter `"default"`, or without one the active
    adapter. Other adapters are in folders of their names.

    `model.push_to_hub` uploads the same weights, but transformers then replaces our card with an empty one.

    Args:
        model: A model with adapters of ours.
        repo_id: Id such as `"me/pets-bsr"`; created if it does not exist. Your own text in its README is kept.
        image_processor: Image processor to save with the adapter, so that a pipeline preprocesses images as in
            training. Default None: the one saved with the adapter, if `load` loaded it.
        private: Whether a new repository is private. Default None: the default of the account.
        token: Hub token. Default None: the one of `hf auth login`.
        revision: Branch; created if it does not exist. Default None: the main branch.
        commit_message: Commit message. Default `"Upload adapter"`.

    Returns:
        URL of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):  # such as an existing pull request
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    adapter = "default" if "default" in model.peft_config else model.active_adapter
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) if adapter == "default" else Path(root, adapter)  # where PEFT saves it
        folder.mkdir(exist_ok=True)
        if api.file_exists(repo_id, "README.md", revision=revision):
            there = api.hf_hub_download(repo_id, "README.md", revision=revision)
            (folder / "README.md").write_bytes(Path(there).read_bytes())
        add_facts(model, adapter_name=adapter, repo_id=repo_id)
        model.save_pretrained(root)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        for path in folder.iterdir() if adapter != "default" else ():
            os.replace(path, Path(root, path.name))
        commit = api.upload_folder(repo_id=repo_id, folder_path=root, revision=revision, commit_message=commit_message)
    return str(commit.commit_url)


__all__ = ["push_to_hub"]
