"""`peft-bsr check-adapter` says what is inside, and gives its verdict as exit code."""

from __future__ import annotations

import shutil

from tests.bad_input.conftest import unseal


def test_a_whole_adapter(run_json, trained):
    found = run_json("check-adapter", trained / "adapter")
    assert found["method"] == "bsr"
    assert found["model"]["family"] == "vit"
    assert found["plan"]["trainable_blocks"] == "last:2"
    assert found["verdict"].startswith("whole")
    assert found["numbers"] > 0 < found["MiB"]
    assert "vit.layers.3.mlp.fc1" in found["trains"]


def test_what_would_be_refused(run, trained, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, _ = run("check-adapter", folder)
    assert code == 1
    assert "refused: '" in (words := " ".join(out.split())) and "fc1" in words, "what is inside is told all the same"
    (folder / "adapter_model.safetensors").write_bytes(content[:-1])
    code, out, _ = run("check-adapter", folder)
    assert code == 1 and "not a complete safetensors file" in " ".join(out.split())


def test_an_adapter_of_an_earlier_version_has_no_digests(run_json, trained, tmp_path):
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    unseal(tmp_path / "adapter", fingerprint=None)
    found = run_json("check-adapter", tmp_path / "adapter")
    assert found["verdict"].startswith("whole") and found["digests"].startswith("none")


def test_no_folder(run):
    code, out, err = run("check-adapter", "./nowhere")
    assert (code, out) == (2, "") and "there is no folder `./nowhere`" in err
