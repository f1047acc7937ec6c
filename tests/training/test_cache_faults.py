"""Faults around a feature cache: other samples, random draws, kills, full disks, two builders, damaged files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from peft_bsr import BSRConfig, FeatureCache, FeatureCacheError
from peft_bsr.training import MixupDataset, cache_files, feature_cache
from peft_bsr.training.cache_files import CacheFiles

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parent))

from test_feature_cache import vit
from test_trainer import Blobs

DATA = Blobs(21, seed=0)
FIELDS = {"tokens": ("bfloat16", [3, 2]), "labels": ("int64", [])}
ROWS = {
    "tokens": torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "labels": torch.arange(6),
}


class Changed(Blobs):
    """Another label or image at some places."""

    def __init__(self, *places: int, name: str = "labels") -> None:
        super().__init__(21, seed=0)
        self.places, self.name = places, name

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, self.name: (item[self.name] + 1) % 3} if index in self.places else item


@pytest.mark.parametrize("name", ["labels", "pixel_values"])
def test_one_other_label_or_image_is_another_data_set(tmp_path, name):
    model = vit()
    FeatureCache.build(model, DATA, tmp_path, progress=False)
    with pytest.raises(FeatureCacheError, match=r"sample 13 is not the one .* another image or label"):
        FeatureCache.build(model, Changed(13, name=name), tmp_path, progress=False, batch_size=4)
    with pytest.raises(FeatureCacheError, match="sample 20 is not the one"):
        FeatureCache.build(model, Changed(20), tmp_path, progress=False, check_all=False)


def test_some_samples_are_enough_where_that_is_asked(tmp_path, monkeypatch):
    cache = FeatureCache.build(vit(), Blobs(200, seed=0), tmp_path, progress=False)
    seen = []
    monkeypatch.setattr(Blobs, "__getitem__", lambda self, i, read=Blobs.__getitem__: seen.append(i) or read(self, i))
    FeatureCache.build(vit(), Blobs(200, seed=0), tmp_path, progress=False, check_all=False)
    assert len(seen) < 120 and {0, 199} <= set(seen)
    assert len(cache) == 200


class Rarely(Blobs):
    """Augmentation that changes one image in five."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "pixel_values": item["pixel_values"] * (1 + (torch.rand(()) < 0.2))}


def test_random_augmentation_is_found_where_it_is_rare_and_in_batches(tmp_path):
    torch.manual_seed(0)
    for data in (Rarely(21, seed=0), MixupDataset(DATA, 3, probability=0.5)):
        with pytest.raises(FeatureCacheError, match="was different when it was read again"):
            FeatureCache.build(vit(), data, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def dinov3(**changes):
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_register_tokens=2,
        **changes,
    )
    return get_peft_model(DINOv3ViTModel(config), BSRConfig(trainable_blocks=[3], reduction_blocks=[]))


IMAGES = [{"pixel_values": DATA[i]["pixel_values"]} for i in range(6)]


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda drawn: vit({"hidden_dropout_prob": 0.3 * drawn}), "vit.embeddings.dropout"),
        (lambda drawn: dinov3() if drawn else dinov3(pos_embed_rescale=None), "rope_embeddings"),
    ],
    ids=["dropout", "positions"],
)
def test_what_a_model_draws_is_not_taken_away_silently(tmp_path, make, part):
    model = make(True).train()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with pytest.raises(FeatureCacheError, match=f"`{part}` is random in training .*`freeze_random=True`"):
        FeatureCache.build(model, IMAGES, tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in model.modules()]
    assert not list(tmp_path.iterdir())
    frozen = FeatureCache.build(model, IMAGES, tmp_path, progress=False, freeze_random=True)
    with frozen.read_by(model):  # it was said
        pass
    steady = FeatureCache.build(make(False), IMAGES, tmp_path, progress=False)  # evaluation gives the same tokens
    with steady.read_by(make(False)):
        pass
    for cache in (steady, FeatureCache.open(tmp_path)):
        with pytest.raises(FeatureCacheError, match=f"`{part}` is random in training"), cache.read_by(model):
            pass
    with FeatureCache.open(tmp_path, freeze_random=True).read_by(model):
        pass


def test_draws_after_the_cut_do_not_count(tmp_path):
    """Positions are drawn for all blocks, but no block has used them in front of the first."""
    torch.manual_seed(0)
    base = dinov3().unload()
    model = get_peft_model(base, BSRConfig(trainable_blocks=[0, 3], reduction_blocks=[])).train()
    cache = FeatureCache.build(model, IMAGES, tmp_path, progress=False, dtype=torch.float32)
    batches = [torch.utils.data.default_collate([data[i] for i in range(6)]) for data in (IMAGES, cache)]
    with cache.read_by(model):
        outputs = [model(**batch).pooler_output for batch in batches if torch.manual_seed(5)]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)


# files alone, from here on


def filled(folder, number=6):
    """Files with so many of their six rows."""
    folder.mkdir(exist_ok=True)
    files = CacheFiles(folder)
    files.create({"of": "rows"}, FIELDS, 6)
    files.open()
    files.append({name: rows[:number] for name, rows in ROWS.items()})
    files.flush()
    return files


def assert_rows(files, number=6):
    for index in range(number):
        row = files.read(index)
        assert all(torch.equal(row[name], rows[index]) for name, rows in ROWS.items()) and row.keys() == ROWS.keys()


def left(folder):
    return {path.name for path in folder.iterdir()}


WHOLE = {"cache.json", "done", "labels.bin", "tokens.bin", "row_crc32.bin"}


def damage(folder, name, change):
    content = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(change(content))


@pytest.mark.parametrize("text", ["-1", "7", "", "x", "9" * 5000])
def test_counts_that_cannot_be_are_refused(tmp_path, text):
    filled(tmp_path)
    (tmp_path / "done").write_text(text)
    with pytest.raises(FeatureCacheError, match="is damaged"):
        FeatureCache.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_rows": -6},
        {"num_rows": 0},
        {"num_rows": 6.0},
        {"fields": []},
        {"fields": {}},
        {"fields": {"../x": ["int64", []]}},
        {"fields": {"labels": ["nn", []]}},
        {"fields": {"labels": ["int64", [-1]]}},
        {"key": 5},
    ],
    ids=repr,
)
def test_descriptions_that_cannot_be_are_refused(tmp_path, change):
    filled(tmp_path)
    about = json.loads((tmp_path / "cache.json").read_text())
    change = {n: about[n] | v if isinstance(v, dict) and v else v for n, v in change.items()}
    (tmp_path / "cache.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(FeatureCacheError, match="is damaged"):
        FeatureCache.open(tmp_path)


def test_rows_belong_to_their_description(tmp_path):
    """Another number in the key, or another dtype of the same size."""
    filled(tmp_path)
    text = (tmp_path / "cache.json").read_text()
    for old, new in (('"rows"', '"rowz"'), ("bfloat16", "float16")):
        (tmp_path / "cache.json").write_text(text.replace(old, new))
        files = CacheFiles(tmp_path)
        files.open()
        with pytest.raises(FeatureCacheError, match="row 0 has another checksum"):
            files.read(0)


def test_rows_that_changed_places_are_damaged(tmp_path):
    filled(tmp_path)
    for name, size in (("tokens.bin", 12), ("labels.bin", 8), ("row_crc32.bin", 8)):
        damage(tmp_path, name, lambda c, size=size: c[size : 2 * size] + c[:size] + c[2 * size :])
    files = CacheFiles(tmp_path)
    files.open()
    with pytest.raises(FeatureCacheError, match=r"row 0 has another checksum\). Delete"):
        files.read(0)
    files.read(2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_done_to_the_files_no_other_row_is_read(tmp_path, data):
    """A byte changed, cut, put in or left out anywhere: an error of ours, or the very rows."""
    shutil.rmtree(tmp_path)
    filled(tmp_path)
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    size = (tmp_path / name).stat().st_size
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "less"]))
    change = {
        "flip": lambda c: c[:place] + bytes([c[place] ^ 1 << bit]) + c[place + 1 :],
        "cut": lambda c: c[:place],
        "more": lambda c: c[:place] + c[place : place + 1] + c[place:],
        "less": lambda c: c[:place] + c[place + 1 :],
    }
    damage(tmp_path, name, change[kind])
    try:
        files = CacheFiles(tmp_path)
        files.open()
        assert files.num_rows == 6
        assert_rows(files, files.num_done)
        assert FeatureCache(files).files.key == {"of": "rows"}
    except FeatureCacheError as error:
        assert str(tmp_path) in str(error)


STEPS = {
    "first file": (cache_files, "_allocate", 0),
    "second file": (cache_files, "_allocate", 1),
    "count": (os, "replace", 0),
    "description": (os, "replace", 1),
    "a row": (os, "fsync", 0),
    "on disk": (os, "fsync", 2),
    "counted": (os, "replace", 2),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are killed")
@pytest.mark.parametrize("step", STEPS)
def test_a_killed_build_is_not_in_the_way(tmp_path, step):
    owner, name, after = STEPS[step]
    child = os.fork()
    if child == 0:
        original, calls = getattr(owner, name), iter(range(100))
        kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == after else original(*args)  # noqa: E731
        setattr(owner, name, kill)
        with CacheFiles(tmp_path).locked(lambda: None):
            filled(tmp_path, 2)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    files = CacheFiles(tmp_path)
    with files.locked(lambda: pytest.fail("the lock of the killed one is there")):
        if not files.exists:
            files.create({"of": "rows"}, FIELDS, 6)
        files.open()
        assert files.num_done in (0, 2)
        files.append({name: rows[files.num_done :] for name, rows in ROWS.items()})
        files.flush()
    assert_rows(files)
    assert left(tmp_path) == WHOLE | {".lock"}


def test_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "labels.bin").write_text("mine")
    with pytest.raises(FeatureCacheError, match=r"holds labels.bin, but no cache.json: .* Choose another folder"):
        filled(tmp_path)
    assert (tmp_path / "labels.bin").read_text() == "mine" and left(tmp_path) == {"labels.bin"}


def test_a_full_disk_is_met_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(FeatureCacheError, match=r"cannot be written \(No space left on device\). Free disk space, or"):
        FeatureCache.build(vit(), DATA, tmp_path, progress=False)
    assert left(tmp_path) == {".lock"}


@contextmanager
def small_disk():
    folder = tempfile.mkdtemp()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode
    ):
        os.rmdir(folder)
        pytest.skip("needs the right to mount a small disk")
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        os.rmdir(folder)


@pytest.mark.parametrize("is_reserved", [True, False])
def test_a_disk_that_fills_up_in_the_middle(is_reserved, monkeypatch):
    """Room that was taken is there; where the system cannot reserve it, an error comes, and the build goes on later."""
    if not is_reserved:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    fields, rows = {"tokens": ("uint8", [4096])}, {"tokens": torch.full((8, 4096), 7, dtype=torch.uint8)}
    with small_disk() as folder:
        files = CacheFiles(folder)
        files.create({}, fields, 32)
        files.open()
        with open(folder / "other", "wb", buffering=0) as other, pytest.raises(OSError, match="No space"):
            while True:
                other.write(bytes(4096))
        if not is_reserved:
            with pytest.raises(FeatureCacheError, match="No space left on device"):
                for _ in range(4):
                    files.append(rows)
            (folder / "other").unlink()
        while files.num_done < 32:
            files.append(rows)
        (folder / "other").unlink(missing_ok=True)
        files.flush()
        assert all(bool((files.read(i)["tokens"] == 7).all()) for i in range(32))
        del files


@contextmanager
def as_nobody():
    """Without the rights of root, for which no folder is read-only."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs rights of files")
def test_folders_that_are_read_only():
    folder = Path(tempfile.mkdtemp())
    try:
        model = vit()
        cache = FeatureCache.build(model, DATA, folder / "whole", progress=False)
        (folder / "whole" / ".lock").unlink()
        (folder / "new").mkdir()
        for path in (*folder.rglob("*"), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with as_nobody():
            for again in (
                FeatureCache.build(model, DATA, folder / "whole", progress=False),
                FeatureCache.open(folder / "whole"),
            ):
                assert torch.equal(again[3]["cached_tokens"], cache[3]["cached_tokens"])
            for name in ("new", "new/inner"):
                with pytest.raises(FeatureCacheError, match=r"cannot be written \(Permission denied\)"):
                    FeatureCache.build(model, DATA, folder / name, progress=False)
    finally:
        for path in (folder, folder / "whole", folder / "new"):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_second_builder_waits_and_takes_what_the_first_has_built(tmp_path, monkeypatch):
    batches, ready, said = [], threading.Event(), threading.Event()

    def append(self, rows, write=CacheFiles.append):
        batches.append(len(rows["labels"]))
        ready.set()
        assert said.wait(20)
        write(self, rows)

    monkeypatch.setattr(CacheFiles, "append", append)
    monkeypatch.setattr(feature_cache, "_say_waiting", lambda _: said.set())
    found = {}

    def build(number):
        found[number] = FeatureCache.build(vit(), DATA, tmp_path, batch_size=4)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(2)]
    threads[0].start()
    assert ready.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert sum(batches) == 21, "each row was written once"
    assert all(torch.equal(found[0][i]["cached_tokens"], found[1][i]["cached_tokens"]) for i in range(21))
    with FileLock(tmp_path / ".lock"):
        FeatureCache.build(vit(), DATA, tmp_path, progress=False)  # a whole one waits for nobody


def test_waiting_is_said(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ZeroDivisionError), CacheFiles(tmp_path).locked(lambda: 1 / 0):
        pass


def test_samples_of_another_kind_are_named(tmp_path):
    data = [DATA[i] for i in range(9)] + [{**DATA[9], "labels": torch.tensor(0.5)}, DATA[10]]
    with pytest.raises(
        FeatureCacheError, match=r"sample 9 or one after it has `labels` float32 \[\], the first .* int64"
    ):
        FeatureCache.build(vit(), data, tmp_path, progress=False, batch_size=1)
