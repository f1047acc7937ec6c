"""`peft_bsr.export`: the file computes what the model does, without this package, and the report says what was seen."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from families import NO_REDUCTION, SUPPORTED
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import peft_bsr
from peft_bsr import ALaSTConfig, BSRConfig, ExportError, HubError, LoSAConfig, MoEConfig, SynQTConfig, export_task
from peft_bsr.core import is_quantized
from peft_bsr.errors import ReductionNotMergedWarning
from peft_bsr.exporting.check import versions_of
from peft_bsr.exporting.formats import FORMATS
from peft_bsr.exporting.prepare import to_image_function
from peft_bsr.prediction import open_predictor

KEEPING = {"reduction_blocks": [0], "keep_rate": 0.5, "init_weights": False}
CONFIGS = {
    "bsr": BSRConfig(trainable_blocks=[1], **KEEPING),
    "lora": BSRConfig(trainable_blocks=[0, 1], trainable="lora", r=2, **KEEPING),
    "full_view": BSRConfig(trainable_blocks=[1], mode="full_view", **KEEPING),
    "all_tokens": BSRConfig(trainable_blocks=[1], keep_rate=1.0, init_weights=False),
    "alast": ALaSTConfig(init_weights=False),
    "synqt": SynQTConfig(reduction_blocks=[0], keep_rate=0.5, num_queries=2),
    "losa": LoSAConfig(**KEEPING),
    "task": BSRConfig(trainable_blocks=[1], tasks={"digits": 4}, **KEEPING),
    "experts": BSRConfig(trainable_blocks=[1], tasks={"digits": 4}, moe=MoEConfig(num_experts=5, top_k=2), **KEEPING),
}


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture
def make_peft():
    """`make_peft("bsr")`: two blocks under that configuration, away from the base model."""

    def make(name: str = "bsr", **sizes: int) -> PeftModel:
        torch.manual_seed(0)
        base = ViTForImageClassification(ViTConfig(**{**SIZES, **sizes}, image_size=32, patch_size=8, num_labels=3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's own call of a deprecated name of transformers
            model = get_peft_model(base, CONFIGS[name])
        for parameter in model.parameters() if name == "synqt" else ():  # its head starts at zero
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1) if parameter.requires_grad else None
        return model.eval()

    return make


@pytest.fixture
def five_images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_is_exported_computes_what_the_model_does_and_leaves_it_alone(name, make_peft, five_images):
    model = make_peft(name)
    state = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    expected = model(pixel_values=five_images).logits
    function = to_image_function(model)
    (found,) = function(five_images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(model(pixel_values=five_images).logits, expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with model.disable_adapter():
        base = model(pixel_values=five_images).logits
    assert (base - expected[:, :3]).abs().max() > 1e-3, "an adapter that does nothing would prove nothing"


@torch.no_grad()
def test_the_unreduced_model_is_the_merged_one(make_peft, five_images):
    model = make_peft("bsr")
    function = to_image_function(model, all_tokens=True)
    with pytest.warns(ReductionNotMergedWarning):
        merged = model.merge_and_unload()
    assert torch.equal(function(five_images)[0], merged(pixel_values=five_images).logits)
    assert not function.plan.reduces


def test_half_precision_is_exported_in_full(make_peft, five_images):
    function = to_image_function(make_peft("bsr").to(torch.bfloat16))
    assert function(five_images)[0].dtype == torch.float32


def test_every_tensor_of_a_model_without_a_head(make_model, five_images):
    model = get_peft_model(make_model("vit_bare"), BSRConfig(reduction_blocks=[1]))
    outputs = to_image_function(model).named_outputs(five_images)
    assert list(outputs) == ["last_hidden_state", "pooler_output"]


def test_the_file_of_a_model_without_a_head_names_no_classes(make_model, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def write(model, sample, path, is_any_batch):  # a graph with the names of the model's, which takes no time
        tensors = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])
            for name in (model.input_name, *model.named_outputs(sample))
        ]
        nodes = [onnx.helper.make_node("Identity", [model.input_name], [one.name]) for one in tensors[1:]]
        graph = onnx.helper.make_graph(nodes, "graph", tensors[:1], tensors[1:])
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=write))
    model, path = get_peft_model(make_model("vit_bare"), BSRConfig(reduction_blocks=[1])), tmp_path / "bare.onnx"
    report = peft_bsr.export(model, "onnx", path, check=False)
    assert not {one.key for one in onnx.load(path).metadata_props} & {"labels", "problem_type"}
    assert report.token_counts[0][0] == 17
    with pytest.raises(HubError, match=r"does not give classes or values .* are last_hidden_state, pooler_output"):
        open_predictor(path)


def test_tokens_of_stages_are_not_counted(tmp_path, monkeypatch):
    quick = replace(FORMATS["torch.export"], write=lambda model, sample, path, is_any_batch: path.touch())
    monkeypatch.setitem(FORMATS, "torch.export", quick)
    model = get_peft_model(NO_REDUCTION["swin"]().eval(), BSRConfig(keep_rate=1.0, trainable_blocks="last:1"))
    report = peft_bsr.export(model, "torch.export", tmp_path / "swin.pt2", check=False)
    assert report.token_counts == []
    assert "tokens into" not in report.describe()


def test_onnx(make_peft, five_images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_peft("bsr")
    report = peft_bsr.export(model, "onnx", tmp_path / "vit.onnx")
    assert report.max_difference < 1e-5
    assert report.token_counts == [(17, 10), (10, 10)]
    assert report.input_shape == (None, 3, 32, 32)
    assert report.file_bytes == (tmp_path / "vit.onnx").stat().st_size
    assert report.speedup == report.unreduced_seconds / report.seconds
    text = report.describe()
    assert "pixel_values [any, 3, 32, 32], 17 tokens into the first block, 10 out of the last" in text
    assert f"{report.speedup:.2f} x faster (CPU, {torch.get_num_threads()} threads" in text
    assert f"onnxruntime {onnxruntime.__version__}" in text
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    for images in (five_images, five_images[:1]):
        (logits,) = session.run(["logits"], {"pixel_values": images.numpy()})
        expected = model(pixel_values=images).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=0)
    assert b"peft_bsr" not in report.path.read_bytes(), "stack traces name this machine's paths"


def test_torch_export_runs_without_this_package(make_peft, five_images, tmp_path):
    model = make_peft("bsr")
    report = peft_bsr.export(model, "torch.export", tmp_path / "vit.pt2", batch_size=5)
    assert report.max_difference < 1e-5
    assert (report.batch_size, report.input_shape) == (5, (5, 3, 32, 32))
    torch.save((five_images, model(pixel_values=five_images).logits), tmp_path / "expected.pt")
    code = (
        "import sys, torch; images, expected = torch.load('expected.pt')\n"
        "(logits,) = torch.export.load('vit.pt2').module()(images)\n"
        "torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)\n"
        "assert not {'peft', 'peft_bsr', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_any_batch_in_torch_export(make_peft, five_images, tmp_path):
    model = make_peft("synqt")
    report = peft_bsr.export(model, "torch.export", tmp_path / "vit.pt2", check=False)
    assert report.speedup is None and report.max_difference is None
    assert "latency" not in report.describe() and "outputs" not in report.describe()
    run = FORMATS["torch.export"].load(report.path)
    for images in (five_images, five_images[:1]):
        torch.testing.assert_close(run(images)[0], model(pixel_values=images).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_int8_weights(make_peft, five_images, tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = make_peft("bsr", hidden_size=128, intermediate_size=512)
    small = peft_bsr.export(model, "onnx", tmp_path / "int8.onnx", quantize="int8", check=False)
    found = FORMATS["onnx"].load(small.path)(five_images)[0]
    expected = model(pixel_values=five_images).logits
    assert small.file_bytes < 0.65 * 4 * sum(p.numel() for p in to_image_function(model).parameters())
    kept = [w for w in onnx.load(small.path).graph.initializer if list(w.dims) == [512, 128]]
    assert [w.data_type for w in kept] == [onnx.TensorProto.FLOAT] * 2, "what follows GELU stays in fp32"
    assert 1e-5 < (found - expected).abs().max() < 0.1 * expected.abs().max(), "close, and not the same"
    assert "int8 weights" in small.describe()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full_view", "alast", "synqt", "losa", "task"])
def test_other_adapters_in_onnx(name, make_peft, tmp_path):
    pytest.importorskip("onnxruntime")
    report = peft_bsr.export(make_peft(name), "onnx", tmp_path / "vit.onnx")
    assert report.max_difference < 1e-5
    assert (report.speedup is None) == (name == "alast")


@pytest.mark.slow
def test_executorch(make_peft, tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed")
    report = peft_bsr.export(make_peft("bsr"), "executorch", tmp_path / "vit.pte")
    assert report.max_difference < 1e-5
    assert (report.batch_size, report.threads) == (1, None)
    assert "its runtime's threads" in report.describe()


def test_the_image_size_is_a_choice(make_model, tmp_path):
    model = get_peft_model(make_model("dinov2"), CONFIGS["bsr"])
    report = peft_bsr.export(model, "torch.export", tmp_path / "vit.pt2", image_size=(48, 64), check=False)
    assert report.input_shape == (None, 3, 48, 64)
    assert report.token_counts[0] == (49, 26)


def test_a_file_that_computes_otherwise_is_refused(make_peft, monkeypatch, tmp_path):
    right = FORMATS["torch.export"]

    def load_wrong(path):
        run = right.load(path)
        return lambda images: [output + 2e-4 * (len(images) == 1) for output in run(images)]  # in a batch of one alone

    monkeypatch.setitem(FORMATS, "torch.export", replace(right, load=load_wrong))
    with pytest.raises(ExportError, match=r"outputs differ by 2\.0e-04 from PyTorch's, more than 1\.0e-04"):
        peft_bsr.export(make_peft("bsr"), "torch.export", tmp_path / "vit.pt2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tflite"}, "`format='tflite'` is unknown. Use one of 'onnx', 'torch.export', 'executorch'"),
        ({"quantize": "int8"}, "`quantize='int8'` with `format='torch.export'`: only \"int8\" with \"onnx\""),
        ({"format": "onnx", "quantize": "int4"}, "`quantize='int4'` with `format='onnx'`"),
        ({"batch_size": 0}, "`batch_size=0` must be a number of images"),
        ({"path": "vit.onnx"}, "must end in '.pt2' for `format='torch.export'`"),
        ({"path": "nowhere/vit.pt2"}, "There is no folder"),
    ],
)
def test_what_cannot_be_asked(settings, message, make_peft, tmp_path):
    asked = {"format": "torch.export", "path": "vit.pt2", **settings}
    with pytest.raises(ExportError) as error:
        peft_bsr.export(make_peft(), asked.pop("format"), tmp_path / asked.pop("path"), **asked)
    assert message in str(error.value)


def test_a_missing_package_is_named(make_peft, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ExportError, match=r"`format='onnx'` needs onnxscript. Run `pip install 'peft-bsr\[export\]'`"):
        peft_bsr.export(make_peft(), "onnx", tmp_path / "vit.onnx")


def test_a_model_without_an_adapter(make_model):
    with pytest.raises(ExportError, match="needs a PeftModel with an adapter of peft_bsr, not a ViTForImage"):
        to_image_function(make_model())
    with pytest.raises(ExportError, match=r"not a PeftModel with LORA\. .*; merge other adapters"):
        to_image_function(get_peft_model(make_model(), LoraConfig(target_modules="all-linear")))


def test_several_tasks_are_exported_one_by_one(make_model, five_images, tmp_path):
    tasks = BSRConfig(trainable_blocks=[2], tasks={"a": 2, "b": 5}, reduction_blocks=[1], init_weights=False)
    model = get_peft_model(make_model(), tasks).eval()
    with pytest.raises(ExportError, match=r"has the tasks \['a', 'b'\]; a file has one.*export_task\(model, 'a'"):
        to_image_function(model)
    export_task(model, "b", tmp_path)
    alone = PeftModel.from_pretrained(make_model(), tmp_path)
    (found,) = to_image_function(alone)(five_images)
    torch.testing.assert_close(found, model(pixel_values=five_images, task="b").logits, atol=1e-6, rtol=0)


def test_the_file_of_a_task_does_not_name_the_base_models_classes(make_peft, tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "digits.onnx"
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    peft_bsr.export(make_peft("task"), "onnx", path, image_processor=processor, check=False)
    said = {one.key for one in onnx.load(path).metadata_props}
    assert "preprocessor_config" in said and not said & {"labels", "problem_type"}
    with pytest.raises(HubError, match=r"does not describe its classes\..*heads of `tasks` have no class names"):
        open_predictor(path)


@pytest.mark.slow
def test_mixtures_of_experts_in_onnx(make_peft, tmp_path):
    pytest.importorskip("onnxruntime")
    report = peft_bsr.export(make_peft("experts"), "onnx", tmp_path / "vit.onnx")
    assert report.max_difference < 1e-5


def test_what_a_format_cannot_take_is_one_error(make_peft, monkeypatch, tmp_path):
    def write(*_):
        raise RuntimeError("no kernel\nand a long trace")

    monkeypatch.setitem(FORMATS, "torch.export", replace(FORMATS["torch.export"], write=write))
    with pytest.raises(ExportError, match=r"^ViTForImage.* cannot be exported to .*: RuntimeError: no kernel$"):
        peft_bsr.export(make_peft(), "torch.export", tmp_path / "vit.pt2")


def test_a_family_whose_entry_makes_images_alone(tmp_path):
    config = BSRConfig(keep_rate=1.0, trainable_blocks="last:1", init_weights=False)
    model = get_peft_model(NO_REDUCTION["segformer"](), config).eval()
    report = peft_bsr.export(model, "torch.export", tmp_path / "segformer.pt2")
    assert report.max_difference < 1e-5
    assert report.input_shape == (None, 3, 128, 128)


def test_a_second_input_is_named():
    model = get_peft_model(SUPPORTED["wav2vec2"](), BSRConfig())
    with pytest.raises(ExportError, match=r"^Wav2Vec2\w+ also takes `attention_mask` \(see its FamilyRule\)"):
        to_image_function(model).sample(1, None)


def test_rounded_weights_are_exported_in_full(make_model, five_images, tmp_path):
    pytest.importorskip("torchao")
    config = BSRConfig(trainable_blocks=[3], reduction_blocks=[1], frozen_weights="int8", init_weights=False)
    model = get_peft_model(make_model(), config).eval()
    function = to_image_function(model)
    assert not any(map(is_quantized, function.parameters()))
    torch.testing.assert_close(function(five_images)[0], model(pixel_values=five_images).logits, atol=1e-5, rtol=0)
    peft_bsr.export(model, "torch.export", tmp_path / "vit.pt2")
    code = "import sys, torch; sys.modules['torchao'] = None; torch.export.load('vit.pt2')"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_version_is_that_of_the_distribution_that_has_the_package(monkeypatch):
    """`onnxruntime` is also in onnxruntime-gpu."""
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    versions = {"onnxruntime-gpu": "1.31.0", "torch": found("torch")}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    assert versions_of(("onnxruntime",))["onnxruntime"] == "1.31.0"
