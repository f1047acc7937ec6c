"""`export`: write an adapter as a file that runs without this package."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from peft_bsr.errors import ExportError, headline
from peft_bsr.exporting.check import TOLERANCE, ExportReport, largest_difference, median_seconds, versions_of
from peft_bsr.exporting.description import add_description, describe_model
from peft_bsr.exporting.formats import FORMATS, Run, quantize_onnx
from peft_bsr.exporting.prepare import ImageFunction, to_image_function
from peft_bsr.hub import find_image_processor, fit_processor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BaseImageProcessor

    from peft_bsr.backbones import ModelSpec

FormatName = Literal["onnx", "torch.export", "executorch"]
_TIMED_BATCH = 8  # where a file takes any batch


def export(
    model: PeftModel,
    format: FormatName,
    path: str | Path,
    *,
    batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    quantize: Literal["int8"] | None = None,
    image_processor: BaseImageProcessor | None = None,
    check: bool = True,
) -> ExportReport:
    """Write a model as a file that runs without this package: weights merged, token reduction kept, fp32, for the CPU.

    Numbers of tokens are constants of the graph, so a file has one image size.

    Args:
        model: From `get_peft_model` or `PeftModel.from_pretrained`; its active adapter is written. It is not changed.
        format: `"onnx"`, `"torch.export"` (for `torch.export.load`) or `"executorch"` (for XNNPACK).
        path: The file to write, ending in `.onnx`, `.pt2` or `.pte`.
        batch_size: Fixed batch size. Default None: dynamic, except for ExecuTorch, which plans its memory ahead: 1.
        image_size: Pixels, one number or (height, width), see `peft_bsr.set_image_size`. Default None: that of the
            model's config.
        quantize: `"int8"`: weights of Linear modules in 8 bits, except the second one of each MLP; about half of the
            size; ONNX only. Outputs are close, not equal: check the accuracy on your images.
        image_processor: A transformers image processor, which is described in an ONNX file, so that `peft-bsr predict`
            and `evaluate` need nothing else. Default None: the one saved with the adapter that `peft_bsr.load` loaded,
            or the base model's own, if its files are on this machine. The report says which.
        check: Compare the file's outputs with PyTorch's, and time it against the unreduced model (a second export).

    Returns:
        The file and its measurements; `print(report.describe())`.

    Raises:
        ConfigError: If `image_size` does not fit the model.
        UnsupportedModelError: If the model cannot take images of `image_size`.
        ExportError: If the model cannot be exported to the format, a package is missing, or, with `check` and without
            `quantize`, if outputs differ by more than 1e-4 from PyTorch's (relative to the largest output if that is
            above 1).

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from peft_bsr import BSRConfig
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig())
        >>> report = export(model, "onnx", "vit.onnx")  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise ExportError(f"`format={format!r}` is unknown. Use one of {', '.join(map(repr, FORMATS))}.")
    if quantize not in (None, "int8") or (quantize and format != "onnx"):
        raise ExportError(f'`quantize={quantize!r}` with `format={format!r}`: only "int8" with "onnx" is supported.')
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ExportError(f"`batch_size={batch_size!r}` must be a number of images, or None for any number.")
    FORMATS[format].check_installed(format)
    path = Path(path)
    if path.suffix != (ending := FORMATS[format].ending):
        raise ExportError(f"`path={str(path)!r}` must end in {ending!r} for `format={format!r}`.")
    if not path.parent.is_dir():
        raise ExportError(f"There is no folder {str(path.parent)!r} to write {path.name!r} to. Create it first.")
    if batch_size is None and not FORMATS[format].any_batch:
        batch_size = 1
    function = to_image_function(model, image_size=image_size)
    # torch.export would make a batch of one a constant
    sample = function.sample(batch_size or 2, image_size)
    description, origin = _describe(model, function, sample, image_processor) if format == "onnx" else ({}, None)
    _write(function, format, path, sample, batch_size is None, quantize)
    if format == "onnx":
        add_description(path, description)
    report = _report(model, function, format, path, quantize, sample, batch_size, origin)
    return _checked(report, model, function, image_size) if check else report


def _write(
    function: ImageFunction, format: str, path: Path, sample: Tensor, is_any_batch: bool, quantize: str | None
) -> None:
    """Write the file; a quantised one from a temporary fp32 file."""
    if quantize:
        with tempfile.TemporaryDirectory() as folder:
            full = Path(folder) / "fp32.onnx"
            _write(function, format, full, sample, is_any_batch, None)
            quantize_onnx(full, path)
        return
    try:
        FORMATS[format].write(function, sample, path, is_any_batch)
    except Exception as error:  # the exporters raise all kinds of errors
        name = type(function.model).__name__
        raise ExportError(f"{name} cannot be exported to {format}: {headline(error)}") from error


def _describe(
    model: PeftModel, function: ImageFunction, sample: Tensor, given: BaseImageProcessor | None
) -> tuple[dict[str, str], str | None]:
    """Metadata of the file, and the origin of its image processor."""
    processor, origin = (given, "the given one") if given is not None else find_image_processor(model)
    fitting = None if processor is None else fit_processor(processor, sample.shape[1:])
    if given is not None and fitting is None:
        raise ExportError(
            f"`image_processor`: {type(given).__name__} does not make images of {list(sample.shape[1:])}, which the "
            "file needs. Pass another one, or another `image_size`."
        )
    has_tasks = bool(getattr(model.peft_config[model.active_adapter], "tasks", None))
    with torch.no_grad():
        has_logits = "logits" in function.named_outputs(sample)
    description = describe_model(function.model, sample.shape[1:], fitting, is_classifier=has_logits and not has_tasks)
    return description, None if fitting is None else origin


def _report(
    model: PeftModel,
    function: ImageFunction,
    format: str,
    path: Path,
    quantize: str | None,
    sample: Tensor,
    batch_size: int | None,
    image_processor: str | None,
) -> ExportReport:
    files = [path, path.with_name(f"{path.name}.data")]
    return ExportReport(
        format=format,
        path=path,
        file_bytes=sum(file.stat().st_size for file in files if file.exists()),
        quantize=quantize,
        input_name=function.input_name,
        input_shape=(batch_size, *sample.shape[1:]),
        image_processor=image_processor,
        token_counts=_count_tokens(model.base_model.spec, function, sample),
        versions=versions_of(FORMATS[format].packages),
    )


def _count_tokens(spec: ModelSpec, function: ImageFunction, sample: Tensor) -> list[tuple[int, int]]:
    """Numbers of tokens in each block, from the number in the first one."""
    if spec.no_reduction is not None:
        return []
    seen: list[int] = []
    handle = function.model.get_submodule(spec.blocks[0]).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            function(sample[:1])
    finally:
        handle.remove()
    return function.plan.token_counts(seen[0], spec.num_special)


def _checked(
    report: ExportReport, model: PeftModel, function: ImageFunction, image_size: int | tuple[int, int] | None
) -> ExportReport:
    """The report with the file's accuracy and time."""
    fixed = report.input_shape[0]
    images = function.sample(fixed or _TIMED_BATCH, image_size)
    written: Run = FORMATS[report.format].load(report.path)
    found = []
    with torch.no_grad():
        for batch in (images,) if fixed else (images, images[:1]):
            found.append(largest_difference(written(batch), function(batch)))
    difference, scale = max(found)
    if not report.quantize and difference > TOLERANCE * scale:
        raise ExportError(
            f"{report.path} was written, but its outputs differ by {difference:.1e} from PyTorch's, more than "
            f"{TOLERANCE * scale:.1e}, on random images. Do not use it; `check=False` skips this check."
        )
    runs = {"reduced": written}
    with tempfile.TemporaryDirectory() as folder:
        if function.plan.reduces:
            unreduced = Path(folder) / report.path.name
            whole = to_image_function(model, all_tokens=True, image_size=image_size)
            sample = whole.sample(fixed or 2, image_size)
            _write(whole, report.format, unreduced, sample, fixed is None, report.quantize)
            runs["unreduced"] = FORMATS[report.format].load(unreduced)
        seconds = median_seconds(runs, images)
    return replace(
        report,
        max_difference=difference,
        batch_size=len(images),
        threads=torch.get_num_threads() if FORMATS[report.format].takes_threads else None,
        seconds=seconds["reduced"],
        unreduced_seconds=seconds.get("unreduced"),
    )


__all__ = ["export"]
