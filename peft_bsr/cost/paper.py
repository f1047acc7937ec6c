"""The memory and compute accounting of the BSR paper (arXiv 2405.10951), to compare with its numbers.

It goes through the layers of one image in forward order and adds up what each saves for backward. PyTorch saves other
tensors and runs in other precisions: `saved_activations`, `count_flops` and `compare` measure the real costs.

Symbols: a tokens in a block's attention, b in its MLP (fewer, if the block drops tokens in between), n after the last
block, D width, F width of the MLP, H heads. fp32 throughout; MB = 2^20 bytes, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import BlockPlan, Plan
from peft_bsr.errors import ConfigError, UnsupportedModelError

VALUE_BYTES = 4
FROZEN_PARAMETER_BYTES = 1
MB = 2**20


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a vision transformer that the accounting needs.

    Attributes:
        depth: Number of blocks.
        width: D, channels of a token.
        mlp_width: F, outputs of the MLP's first Linear.
        num_heads: H, attention heads.
        num_special: Number of special tokens, which are never dropped.
        num_patches: Number of patch tokens.
        image_values: Values in one image (channels x height x width); patches do not overlap.
        classifiers: (inputs, outputs) of every Linear after the blocks.
        has_final_norm: Whether there is a norm after the blocks; it is counted for all tokens.
        block_parameters: Parameters of one block.
        head_parameters: Parameters of the norm and the Linears after the blocks.
        embedding_parameters: All other parameters.
    """

    depth: int
    width: int
    mlp_width: int
    num_heads: int
    num_special: int
    num_patches: int
    image_values: int
    classifiers: tuple[tuple[int, int], ...]
    has_final_norm: bool
    block_parameters: int
    head_parameters: int
    embedding_parameters: int

    @classmethod
    def of(cls, model: nn.Module, spec: ModelSpec) -> Dimensions:
        """Read the sizes from a model. Only shapes are used, so its weights may be on the meta device.

        Args:
            model: The model without adapters.
            spec: Spec of the model, from `probe_model`.

        Raises:
            UnsupportedModelError: If the accounting has no rule for a part of the model; the message names all of them.

        Examples:
            >>> from transformers import ViTConfig, ViTForImageClassification
            >>> from peft_bsr import probe_model
            >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
            >>> model = ViTForImageClassification(tiny)
            >>> Dimensions.of(model, probe_model(model)).classifiers
            ((32, 2),)
        """
        mlp = _mlp_shapes(model, spec)
        head = [model.get_submodule(name) for name in spec.head]
        shapes = [tuple(getattr(getattr(module, "weight", None), "shape", ())) for module in head]
        norms, linears = ([shape for shape in shapes if len(shape) == rank] for rank in (1, 2))
        problems = []
        if spec.block_spec is None:
            problems.append("blocks of norm, attention, norm and MLP with two residuals, which this model lacks")
        elif len(mlp) != 2 or mlp[0] != mlp[1][::-1]:
            problems.append(f"an MLP of two Linears, but this model's has weights of shapes {mlp}")
        if not spec.num_heads:
            problems.append("a number of attention heads, which was not found in this model")
        if len(norms) > 1 or len(norms) + len(linears) < len(shapes):
            problems.append(f"at most one norm and Linears after the blocks, but this model has {', '.join(spec.head)}")
        if problems:
            raise UnsupportedModelError(
                f"The paper's accounting needs {'; and '.join(problems)}. Measure this model with `compare`, or with "
                "`saved_activations` and `count_flops`."
            )
        block_parameters = _num_parameters(model.get_submodule(spec.blocks[0]))
        head_parameters = _num_parameters(*head)
        return cls(
            depth=spec.depth,
            width=spec.width,
            mlp_width=mlp[0][0],
            num_heads=spec.num_heads,
            num_special=spec.num_special,
            num_patches=spec.num_patches,
            image_values=math.prod(spec.image_shape),
            classifiers=tuple((inputs, outputs) for outputs, inputs in linears),
            has_final_norm=bool(norms),
            block_parameters=block_parameters,
            head_parameters=head_parameters,
            embedding_parameters=_num_parameters(model) - spec.depth * block_parameters - head_parameters,
        )


@dataclass(frozen=True)
class PaperCost:
    """Training costs by the accounting of the paper; `rules` gives the formula of each number.

    Attributes:
        batch_size: Images per step.
        peak_layer: Layer with the highest memory of activations.
        saved_bytes_per_image: Memory saved for backward when that layer runs.
        working_bytes_per_image: Memory that the layer itself uses while it runs.
        trainable_parameters: Number of trainable parameters.
        frozen_parameters: Number of frozen parameters.
        forward_macs_per_image: Multiply-accumulates of a forward pass (FLOPs = 2 x MACs).
        rules: Name of a number -> its formula.
    """

    batch_size: int
    peak_layer: str
    saved_bytes_per_image: int
    working_bytes_per_image: int
    trainable_parameters: int
    frozen_parameters: int
    forward_macs_per_image: int

    rules: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "memory_bytes": "activations + parameters; no gradients, no optimizer state",
            "activation_bytes": "(saved + working) x images, at the layer where that is highest",
            "saved_bytes_per_image": "4 bytes x (inputs of trained Linears, convolutions and norms, and from the first "
            "trained block on H a^2 + 3 a D of each attention and the input of each GELU)",
            "working_bytes_per_image": "4 bytes x (input and output of a Linear or convolution, input of a norm or "
            "GELU; a D more inside the attention, for the residual)",
            "parameter_bytes": "4 bytes x trained + 1 byte x frozen (an assumption of the paper)",
            "forward_macs_per_image": "4 a D^2 + 2 a^2 D + 2 b D F for each block, and the patch embedding and "
            "classifiers; FLOPs = 2 x MACs",
        }
    )

    @property
    def activation_bytes(self) -> int:
        """Activations of the whole batch at the peak."""
        return (self.saved_bytes_per_image + self.working_bytes_per_image) * self.batch_size

    @property
    def parameter_bytes(self) -> int:
        """Trained and frozen parameters."""
        return VALUE_BYTES * self.trainable_parameters + FROZEN_PARAMETER_BYTES * self.frozen_parameters

    @property
    def memory_bytes(self) -> int:
        """Training memory: activations and parameters."""
        return self.activation_bytes + self.parameter_bytes

    def describe(self) -> str:
        """One line for each number with its formula, and a line with the conditions."""
        lines = [f"{name.split('_')[0]:<10}  {self._in_units(name):>11}  {rule}" for name, rule in self.rules.items()]
        lines.append(
            f"Accounting of arXiv 2405.10951, not a measurement: fp32, batch {self.batch_size}, MB = 2^20 bytes, peak "
            f"at {self.peak_layer}; saved, working and forward per image; stock blocks, without `lean` and `int8`; a "
            "tokens in a block's attention, b in its MLP, D and F their widths, H heads."
        )
        return "\n".join(lines)

    def _in_units(self, name: str) -> str:
        value = getattr(self, name)
        return f"{value / 1e9:.2f} GMACs" if "macs" in name else f"{value / MB:.1f} MB"


def paper_cost(
    dimensions: Dimensions, plan: Plan, *, batch_size: int = 128, trains_embeddings: bool = False
) -> PaperCost:
    """Memory and compute of training by a plan, by the paper's accounting (arXiv 2405.10951; see `PaperCost.rules`).

    Trained blocks are trained with all their weights, as is everything after the blocks. The rules describe the stock
    block: savings of `Plan.with_lean` and `with_int8` are not counted, and of other modules (LayerScale, dropout) only
    the parameters are counted.

    Args:
        dimensions: Sizes of the model.
        plan: Plan for its blocks.
        batch_size: Images per step. Default 128, as in the paper.
        trains_embeddings: Whether everything before the blocks is trained too; with a plan that trains every block this
            is full fine-tuning. Default False.

    Returns:
        The `PaperCost`.

    Raises:
        ConfigError: If the plan has another number of blocks than the model.

    Examples:
        >>> from peft_bsr import Reduction
        >>> vit_b = Dimensions(
        ...     depth=12, width=768, mlp_width=3072, num_heads=12, num_special=1, num_patches=196,
        ...     image_values=3 * 224 * 224, classifiers=((768, 10),), has_final_norm=True,
        ...     block_parameters=7_087_872, head_parameters=9_226, embedding_parameters=742_656,
        ... )
        >>> cost = paper_cost(vit_b, Plan.static(12, [3, 7, 11], {i: Reduction(0.5) for i in (3, 6, 9)}))
        >>> print(f"{cost.memory_bytes / 2**20:.1f} MB, {cost.forward_macs_per_image / 1e9:.2f} GMACs")
        2937.7 MB, 8.82 GMACs
    """
    if len(plan.blocks) != dimensions.depth:
        raise ConfigError(
            f"the plan is for {len(plan.blocks)} blocks, but this model has {dimensions.depth}. Create it for the "
            "`depth` of the model's spec."
        )
    num_tokens = dimensions.num_special + dimensions.num_patches
    extended = Plan((*plan.blocks, BlockPlan()))  # one more block without effect, for the tokens after the last block
    *counts, (num_out, _) = extended.token_counts(num_tokens, dimensions.num_special)
    num_out = num_tokens if plan.mode == "full_view" else num_out

    layers = list(_layers(dimensions, plan, counts, num_out, trains_embeddings))
    saved_before = accumulate((layer.saved for layer in layers), initial=0)
    saved, peak = max(zip(saved_before, layers, strict=False), key=lambda pair: pair[0] + pair[1].working)
    trainable = len(plan.trained_blocks) * dimensions.block_parameters + dimensions.head_parameters
    frozen = (dimensions.depth - len(plan.trained_blocks)) * dimensions.block_parameters
    return PaperCost(
        batch_size=batch_size,
        peak_layer=peak.name,
        saved_bytes_per_image=VALUE_BYTES * saved,
        working_bytes_per_image=VALUE_BYTES * peak.working,
        trainable_parameters=trainable + (dimensions.embedding_parameters if trains_embeddings else 0),
        frozen_parameters=frozen + (0 if trains_embeddings else dimensions.embedding_parameters),
        forward_macs_per_image=_forward_macs(dimensions, counts),
    )


class _Layer(NamedTuple):
    """A layer: values (not bytes) of one image that it uses while it runs, and values that it saves for backward."""

    name: str
    working: int
    saved: int


def _layers(
    dimensions: Dimensions, plan: Plan, counts: list[tuple[int, int]], num_out: int, trains_embeddings: bool
) -> Iterator[_Layer]:
    """All layers in forward order; `num_out` tokens reach the final norm."""
    image, width = dimensions.image_values, dimensions.width
    yield _Layer("patch embedding", image + dimensions.num_patches * width, image * trains_embeddings)
    first = 0 if trains_embeddings else min(plan.trained_blocks, default=dimensions.depth)
    for index, (block, (attention, mlp)) in enumerate(zip(plan.blocks, counts, strict=True)):
        for layer in _block_layers(dimensions, attention, mlp, block.trained, in_graph=index >= first):
            yield layer._replace(name=f"block {index} {layer.name}")
    if dimensions.has_final_norm:
        yield _Layer("final norm", num_out * width, num_out * width)
    for inputs, outputs in dimensions.classifiers:
        yield _Layer("classifier", inputs + outputs, inputs)


def _block_layers(dimensions: Dimensions, a: int, b: int, trained: bool, in_graph: bool) -> Iterator[_Layer]:
    """Layers of a block, for a tokens in its attention and b in its MLP. q, k and v count as one Linear."""
    tokens, mlp_tokens, hidden = a * dimensions.width, b * dimensions.width, b * dimensions.mlp_width
    residual = tokens
    yield _Layer("LN1", tokens, tokens * trained)
    yield _Layer("attention", residual, (dimensions.num_heads * a**2 + 3 * tokens) * in_graph)
    yield _Layer("q, k, v", 4 * tokens + residual, tokens * trained)
    yield _Layer("o", 2 * tokens + residual, tokens * trained)
    yield _Layer("LN2", mlp_tokens, mlp_tokens * trained)
    yield _Layer("fc1", mlp_tokens + hidden, mlp_tokens * trained)
    yield _Layer("GELU", hidden, hidden * in_graph)
    yield _Layer("fc2", hidden + mlp_tokens, hidden * trained)


def _forward_macs(dimensions: Dimensions, counts: list[tuple[int, int]]) -> int:
    width = dimensions.width
    blocks = sum(4 * a * width**2 + 2 * a**2 * width + 2 * b * width * dimensions.mlp_width for a, b in counts)
    return dimensions.image_values * width + blocks + sum(i * o for i, o in dimensions.classifiers)


def _mlp_shapes(model: nn.Module, spec: ModelSpec) -> list[tuple[int, ...]]:
    """Shapes of the weights of a block's MLP, in forward order."""
    block = model.get_submodule(spec.blocks[0])
    param_modules = [leaf for role, leaf in sorted(spec.paths.items()) if role.startswith("mlp.")]
    weights = [p for leaf in param_modules for p in block.get_submodule(leaf).parameters() if p.ndim > 1]
    return [tuple(weight.shape) for weight in weights]


def _num_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
