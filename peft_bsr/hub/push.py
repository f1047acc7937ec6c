"""An adapter onto the Hub, with its own model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel

from peft_bsr.hub.facts import add_facts


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    image_processor: Any = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload the model's adapters and the model card.

    `model.push_to_hub` uploads the same weights, but transformers puts a blank card in the place of ours afterwards.

    Args:
        model: With adapters of ours.
        repo_id: Such as `"me/pets-bsr"`; made if there is none. Its README keeps what a person wrote.
        image_processor: Saved beside the adapter, so that a pipeline sees images as training did. Default none.
        private: Whether a new repository is private. Default None: the account's choice.
        token: Default None: the one of `hf auth login`.
        revision: Branch. Default None: the main one.
        commit_message: Of the one commit. Default `"Upload adapter"`.

    Returns:
        Address of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        if api.file_exists(repo_id, "README.md", revision=revision):
            there = api.hf_hub_download(repo_id, "README.md", revision=revision)
            Path(folder, "README.md").write_bytes(Path(there).read_bytes())
        add_facts(model, repo_id=repo_id)
        model.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(commit.commit_url)


__all__ = ["push_to_hub"]
