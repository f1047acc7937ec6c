"""`with_head`: add a classifier to a vision model without a head."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from peft_bsr.backbones.headed_model import BackboneForImageClassification, BackboneWithHeadConfig, bare_class
from peft_bsr.backbones.pooling import POOLS, Pool
from peft_bsr.errors import ConfigError, UnsupportedModelError
from peft_bsr.problem_type import TASKS, ProblemType


def with_head(
    backbone: PreTrainedModel,
    num_labels: int,
    pool: Pool | None = None,
    labels: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
    dropout: float = 0.0,
) -> BackboneForImageClassification:
    """Add a classifier to a vision model without a head: DINOv3, AIMv2, RADIO, a SigLIP vision tower, ...

    The classifier is new and has to be trained. `get_peft_model(with_head(...), BSRConfig())` trains it with the
    adapter. After `import peft_bsr`, the model saves and loads like any transformers model.

    Args:
        backbone: A transformers vision model with its weights that returns `last_hidden_state`. It becomes part of
            the new model and is not copied.
        num_labels: Number of classes, labels or values.
        pool: What the classifier reads: `"class"` (the class token; the mean if there are several, for RADIO all of
            them), `"mean"` (of the patches), `"class+mean"` (both, concatenated), `"attention"` (one query over the
            patches, the backbone's own if it has one). Default None: what the family was trained for, see
            docs/guides/with_head.md.
        labels: Names of the classes or values. Default None: transformers' `LABEL_0`, ...
        problem_type: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`. Default None:
            transformers chooses it from the first labels.
        dropout: Dropout rate on the classifier's input. Default 0.

    Returns:
        The model, in the backbone's training or evaluation mode.

    Raises:
        ConfigError: Naming every invalid argument. The backbone is unchanged.
        UnsupportedModelError: If the backbone already has a head, or does not return one sequence of tokens per image.

    Examples:
        >>> from transformers import DINOv3ViTConfig, DINOv3ViTModel
        >>> tiny = DINOv3ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = with_head(DINOv3ViTModel(tiny), num_labels=3, labels=["cat", "dog", "owl"])
        >>> model.config.pool, model.classifier.in_features, model.config.id2label[2]
        ('class+mean', 64, 'owl')
    """
    problems = []
    if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1:
        problems.append(f"`num_labels={num_labels!r}` must be a whole number of at least 1.")
    if pool is not None and pool not in POOLS:
        problems.append(f"`pool={pool!r}` is unknown. Use one of {', '.join(map(repr, POOLS))}, or None.")
    if labels is not None and (isinstance(labels, str) or len(labels) != num_labels):
        problems.append(f"`labels={labels!r}` must be the {num_labels} names that `num_labels` asks for.")
    if problem_type is not None and problem_type not in (known := list(TASKS.values())):
        problems.append(f"`problem_type={problem_type!r}` is unknown. Use one of {', '.join(map(repr, known))}.")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        problems.append(f"`dropout={dropout!r}` must be at least 0 and below 1.")
    if problems:
        raise ConfigError.from_problems("with_head", problems)
    _check_class(backbone)
    config = BackboneWithHeadConfig(
        backbone.config, pool=pool, classifier_dropout=float(dropout), problem_type=problem_type, num_labels=num_labels
    )
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    return BackboneForImageClassification.around(backbone, config)


def _check_class(backbone: object) -> None:
    """Reject a model that cannot be created again from its configuration, or that has a head."""
    if not isinstance(backbone, PreTrainedModel):
        raise UnsupportedModelError(
            f"with_head needs a transformers vision model, not {type(backbone).__name__}. Load one with "
            "`AutoModel.from_pretrained(...)`, and attach an adapter to the result."
        )
    expected = bare_class(backbone.config)
    if type(backbone) is not expected:
        raise UnsupportedModelError(
            f"with_head needs a {expected.__name__}, which has no head, not a {type(backbone).__name__}. Give the "
            "vision model inside, or load it with `AutoModel.from_pretrained(...)`."
        )


__all__ = ["with_head"]
