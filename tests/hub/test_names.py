"""A name that is neither a folder nor a repository is refused at once, with what is close."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

import peft_bsr
from peft_bsr import HubError
from peft_bsr.cli.sources import find_adapter
from peft_bsr.hub.files import folder_read, list_files
from peft_bsr_cli import main


@pytest.fixture
def asked(monkeypatch):
    """A Hub that does not answer; what it was asked."""
    calls: list[tuple[str, float]] = []

    def fail(self, name, *, timeout, **_):
        calls.append((name, timeout))
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", fail)
    return calls


@pytest.mark.parametrize("read", [peft_bsr.load, peft_bsr.pipeline, find_adapter], ids=["load", "pipeline", "cli"])
def test_the_hub_is_asked_once_and_not_for_long(read, asked):
    with pytest.raises(HubError, match=r"`me/pets` is not a local folder, and cannot be read from the Hub \(Conn"):
        read("me/pets")
    assert asked == [("me/pets", 5.0)]


@pytest.mark.parametrize("name", ["dinov2", "./outputs/run", "a/b/c", "~/nowhere", "/nowhere/at/all"])
def test_what_cannot_be_an_id_is_not_asked_for(name, asked, capsys):
    assert main(["inspect", name]) == 2
    assert f"there is no folder `{name}`" in capsys.readouterr().err
    assert asked == []


def test_folders_that_are_close_are_named(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "adapter").mkdir(parents=True)
    with pytest.raises(HubError, match=r"there is no folder `output` \(close: `outputs`\)"):
        list_files("output")
    with pytest.raises(HubError, match=r"`outputs/adaptor` is not a local folder \(close: `outputs/adapter`\)"):
        list_files("outputs/adaptor")


def test_a_missing_base_is_found_out_at_once(make_adapter, tmp_path, asked):
    model = make_adapter()
    model.peft_config["default"].base_model_name_or_path = "me/base"
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(HubError, match=r"base model `me/base` cannot be read .* as `base=`"):
        peft_bsr.load(tmp_path / "adapter")
    assert [name for name, _ in asked] == ["me/base"]


def test_without_a_network_the_cached_adapter_is_read_as_it_is(asked, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "1" * 40
    snapshot = tmp_path / "models--me--pets" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    (tmp_path / "models--me--pets" / "refs").mkdir()
    (tmp_path / "models--me--pets" / "refs" / "main").write_text(commit)
    assert folder_read("me/pets") == str(snapshot)
    assert asked == [("me/pets", 5.0)], "whether it has an image processor"
    (snapshot / "preprocessor_config.json").write_text("{}")
    assert folder_read("me/pets") == str(snapshot)
    assert len(asked) == 1


def test_a_damaged_adapter_beside_a_model_is_no_model(monkeypatch):
    """A repository with both files: what cannot be read is said, not taken for its base model."""
    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "adapter_config.json")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it asks again for 20 s
    with pytest.raises(HubError, match="The adapter `me/both` cannot be read"):
        find_adapter("me/both")
