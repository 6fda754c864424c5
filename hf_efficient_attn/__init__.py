"""Efficient-attention Transformers as ordinary Hugging Face models.

`import hf_efficient_attn` registers every family with the Auto classes of transformers, and its mechanisms as
attention functions; that is its only side effect.
Classes load when they are first used.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .auto import FAMILIES, after_import, after_models, public_names, register
from .integrations import register_attention


if TYPE_CHECKING:
    from .attention import ATTENTIONS
    from .callbacks import ModelCardCallback, RedrawProjections, RedrawRotations
    from .checkpoints import checkpoint_problems, last_complete_checkpoint
    from .conversion import Conversion, convert
    from .data import DataCollatorWithGlobalAttention, DataCollatorWithPacking, DataCollatorWithPatchMask
    from .integrations.helper import use_efficient_attention
    from .models.eff_big_bird.configuration_eff_big_bird import EffBigBirdConfig
    from .models.eff_big_bird.modeling_eff_big_bird import (
        EffBigBirdForMaskedLM,
        EffBigBirdForMultipleChoice,
        EffBigBirdForPreTraining,
        EffBigBirdForQuestionAnswering,
        EffBigBirdForReplacedTokenDetection,
        EffBigBirdForSequenceClassification,
        EffBigBirdForTokenClassification,
        EffBigBirdModel,
        EffBigBirdPreTrainedModel,
    )
    from .models.eff_electra.configuration_eff_electra import EffElectraConfig
    from .models.eff_electra.modeling_eff_electra import (
        EffElectraForMaskedLM,
        EffElectraForMultipleChoice,
        EffElectraForPreTraining,
        EffElectraForQuestionAnswering,
        EffElectraForSequenceClassification,
        EffElectraForTokenClassification,
        EffElectraModel,
        EffElectraPreTrainedModel,
    )
    from .models.eff_longformer.configuration_eff_longformer import EffLongformerConfig
    from .models.eff_longformer.modeling_eff_longformer import (
        EffLongformerForCausalLM,
        EffLongformerForMaskedLM,
        EffLongformerForMultipleChoice,
        EffLongformerForQuestionAnswering,
        EffLongformerForReplacedTokenDetection,
        EffLongformerForSequenceClassification,
        EffLongformerForTokenClassification,
        EffLongformerModel,
        EffLongformerPreTrainedModel,
    )
    from .models.eff_nystromformer.configuration_eff_nystromformer import EffNystromformerConfig
    from .models.eff_nystromformer.modeling_eff_nystromformer import (
        EffNystromformerForMaskedLM,
        EffNystromformerForMultipleChoice,
        EffNystromformerForQuestionAnswering,
        EffNystromformerForReplacedTokenDetection,
        EffNystromformerForSequenceClassification,
        EffNystromformerForTokenClassification,
        EffNystromformerModel,
        EffNystromformerPreTrainedModel,
    )
    from .models.eff_performer.configuration_eff_performer import EffPerformerConfig
    from .models.eff_performer.modeling_eff_performer import (
        EffPerformerForCausalLM,
        EffPerformerForMaskedLM,
        EffPerformerForMultipleChoice,
        EffPerformerForQuestionAnswering,
        EffPerformerForReplacedTokenDetection,
        EffPerformerForSequenceClassification,
        EffPerformerForTokenClassification,
        EffPerformerModel,
        EffPerformerPreTrainedModel,
    )
    from .models.eff_reformer.configuration_eff_reformer import EffReformerConfig
    from .models.eff_reformer.modeling_eff_reformer import (
        EffReformerForCausalLM,
        EffReformerForMaskedLM,
        EffReformerForMultipleChoice,
        EffReformerForQuestionAnswering,
        EffReformerForReplacedTokenDetection,
        EffReformerForSequenceClassification,
        EffReformerForTokenClassification,
        EffReformerModel,
        EffReformerPreTrainedModel,
    )
    from .models.eff_vit.configuration_eff_vit import EffViTConfig
    from .models.eff_vit.modeling_eff_vit import (
        EffViTBackbone,
        EffViTForImageClassification,
        EffViTForMaskedImageModeling,
        EffViTModel,
        EffViTPreTrainedModel,
    )
    from .onnx.export import OnnxExport, export_onnx
    from .optimization import layerwise_parameter_groups
    from .patterns import AttentionPattern, attention_pattern, draw_pattern
    from .pretraining.configuration_eff_electra_joint import EffElectraJointConfig
    from .pretraining.masking import DataCollatorForReplacedTokenDetection
    from .pretraining.modeling_eff_electra_joint import EffElectraForJointPreTraining
    from .pretraining.sizes import ELECTRA_SIZES
    from .pretraining.trainer import ElectraTrainer, EpochOfMasks
    from .question_answering import QuestionAnswerer
    from .tokenization import byte_tokenizer

__version__ = "0.1.0"

_FAMILY_NAMES = public_names()
_OTHER_NAMES = {
    "ATTENTIONS": ".attention",
    "AttentionPattern": ".patterns",
    "Conversion": ".conversion",
    "DataCollatorForReplacedTokenDetection": ".pretraining.masking",
    "DataCollatorWithGlobalAttention": ".data",
    "DataCollatorWithPacking": ".data",
    "DataCollatorWithPatchMask": ".data",
    "ELECTRA_SIZES": ".pretraining.sizes",
    "ElectraTrainer": ".pretraining.trainer",
    "EpochOfMasks": ".pretraining.trainer",
    "ModelCardCallback": ".callbacks",
    "OnnxExport": ".onnx.export",
    "QuestionAnswerer": ".question_answering",
    "RedrawProjections": ".callbacks",
    "RedrawRotations": ".callbacks",
    "attention_pattern": ".patterns",
    "byte_tokenizer": ".tokenization",
    "checkpoint_problems": ".checkpoints",
    "convert": ".conversion",
    "draw_pattern": ".patterns",
    "export_onnx": ".onnx.export",
    "last_complete_checkpoint": ".checkpoints",
    "layerwise_parameter_groups": ".optimization",
    "use_efficient_attention": ".integrations.helper",
}

__all__ = ["FAMILIES", "register", *_OTHER_NAMES, *_FAMILY_NAMES]


def __getattr__(name: str) -> Any:
    if name in _FAMILY_NAMES:
        family, kind = _FAMILY_NAMES[name]
        # A class in hand means it is about to be used: the Auto classes must know all of it.
        importlib.import_module(".auto", __name__).register_models()
        value = getattr(family.module(kind), name)
    elif name in _OTHER_NAMES:
        value = getattr(importlib.import_module(_OTHER_NAMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _publish() -> None:
    importlib.import_module(".hub.publishing", __name__).attach()


def _fuse(table: type) -> None:
    if importlib.util.find_spec("triton") is not None:
        table.source = _kernels


def _kernels() -> "Mapping[str, Callable[..., Any]]":
    from .cuda import FUSED  # loads Triton: not before a tensor on a GPU is there

    return FUSED


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after_models.append(_publish)
after_import(f"{__name__}.functional.fused", "FusedTable", _fuse)
register()
register_attention()
