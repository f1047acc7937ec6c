"""Memory-efficient fine-tuning of vision transformers for Hugging Face PEFT.

Importing this package registers its methods, so that `get_peft_model`, `PeftModel.from_pretrained` and transformers'
`load_adapter` know them:

    import peft_bsr
    from peft import get_peft_model
    from peft_bsr import BSRConfig

    model = get_peft_model(vit, BSRConfig())
"""

from peft_bsr.registration import check_peft_version

check_peft_version()

from peft_bsr.backbones import (  # noqa: E402
    FamilyRule,
    ModelSpec,
    probe_model,
    register_family,
    set_image_size,
    unregister_family,
    with_head,
)
from peft_bsr.core import Route  # noqa: E402
from peft_bsr.deprecation import renamed  # noqa: E402
from peft_bsr.engine import Plan, Reduction, record_routes  # noqa: E402
from peft_bsr.errors import (  # noqa: E402
    AdapterError,
    AdapterFileError,
    AdapterNameWarning,
    AdapterSwitchedWarning,
    ConfigError,
    DatasetError,
    ExportError,
    FeatureCacheError,
    ForwardError,
    HubError,
    InputError,
    LeanBlockWarning,
    MemoryBudgetWarning,
    MissingDependencyError,
    NonFiniteLossError,
    OtherWeightsWarning,
    PeftBsrError,
    PeftBsrWarning,
    ProcessorWarning,
    ReductionNotMergedWarning,
    RoundedUpdatesWarning,
    TrainabilityError,
    UnreadableImageWarning,
    UnsupportedModelError,
    UnsupportedPeftError,
    UsageError,
)
from peft_bsr.exporting import ExportReport, export  # noqa: E402
from peft_bsr.hub import add_facts, load, load_image_processor, pipeline, push_to_hub  # noqa: E402
from peft_bsr.multitask import MoEConfig, MultitaskOutput, TaskConfig, record_usage  # noqa: E402
from peft_bsr.prediction import Prediction, predict  # noqa: E402
from peft_bsr.training import FeatureCache, TrainabilityCallback, compile, verify_trainability  # noqa: E402
from peft_bsr.tuners import (  # noqa: E402
    ALaSTConfig,
    ALaSTModel,
    BSRConfig,
    BSRModel,
    LoSAConfig,
    LoSAModel,
    SynQTConfig,
    SynQTModel,
    add_task,
    export_task,
)
from peft_bsr.tuners.base.files import check_adapter  # noqa: E402

__version__ = "0.1.0"
__getattr__ = renamed(__name__, {"Column": "ModelSpec", "probe_column": "probe_model"}, globals())

__all__ = [
    "ALaSTConfig",
    "ALaSTModel",
    "AdapterError",
    "AdapterFileError",
    "AdapterNameWarning",
    "AdapterSwitchedWarning",
    "BSRConfig",
    "BSRModel",
    "ConfigError",
    "DatasetError",
    "ExportError",
    "ExportReport",
    "FamilyRule",
    "FeatureCache",
    "FeatureCacheError",
    "ForwardError",
    "HubError",
    "InputError",
    "LeanBlockWarning",
    "LoSAConfig",
    "LoSAModel",
    "MemoryBudgetWarning",
    "MissingDependencyError",
    "MoEConfig",
    "ModelSpec",
    "MultitaskOutput",
    "NonFiniteLossError",
    "OtherWeightsWarning",
    "PeftBsrError",
    "PeftBsrWarning",
    "Plan",
    "Prediction",
    "ProcessorWarning",
    "Reduction",
    "ReductionNotMergedWarning",
    "RoundedUpdatesWarning",
    "Route",
    "SynQTConfig",
    "SynQTModel",
    "TaskConfig",
    "TrainabilityCallback",
    "TrainabilityError",
    "UnreadableImageWarning",
    "UnsupportedModelError",
    "UnsupportedPeftError",
    "UsageError",
    "add_facts",
    "add_task",
    "check_adapter",
    "compile",
    "export",
    "export_task",
    "load",
    "load_image_processor",
    "pipeline",
    "predict",
    "probe_model",
    "push_to_hub",
    "record_routes",
    "record_usage",
    "register_family",
    "set_image_size",
    "unregister_family",
    "verify_trainability",
    "with_head",
]
