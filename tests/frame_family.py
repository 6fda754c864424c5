"""Families that exist for tests only: the encoder frame around plain softmax attention, under BERT's kinds of names."""

from types import SimpleNamespace
from typing import Any

import torch
from helpers import TINY, mask_of, random_ids, randomise_
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from hf_efficient_attn.attention import SoftmaxSelfAttention
from hf_efficient_attn.encoder import pretraining_tasks, tasks
from hf_efficient_attn.encoder.configuration import EffEncoderConfig
from hf_efficient_attn.encoder.heads import (
    BertLMHead,
    DenseClassificationHead,
    PooledClassificationHead,
    RobertaLMHead,
)
from hf_efficient_attn.encoder.layer import EncoderLayer
from hf_efficient_attn.encoder.model import EffEncoderModel, EffPreTrainedModel


@strict
class FrameConfig(EffEncoderConfig):
    """The shared fields and nothing else."""

    model_type = "eff_frame_for_tests"


def make_family(prefix: str, lm_head: type[nn.Module], classifier: type[nn.Module]) -> SimpleNamespace:
    """The classes of one family, the way a family's modeling file writes them."""

    class FramePreTrainedModel(EffPreTrainedModel):
        config_class = FrameConfig
        base_model_prefix = prefix
        _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": SoftmaxSelfAttention}

    class FrameModel(EffEncoderModel, FramePreTrainedModel):
        attention_class = SoftmaxSelfAttention

    class FrameForPreTraining(pretraining_tasks.ForPreTraining, FramePreTrainedModel):
        base_class, head_class = FrameModel, lm_head

    class FrameForMaskedLM(pretraining_tasks.ForMaskedLM, FramePreTrainedModel):
        base_class, head_class = FrameModel, lm_head

    class FrameForSequenceClassification(tasks.ForSequenceClassification, FramePreTrainedModel):
        base_class, head_class = FrameModel, classifier

    class FrameForTokenClassification(tasks.ForTokenClassification, FramePreTrainedModel):
        base_class = FrameModel

    class FrameForQuestionAnswering(tasks.ForQuestionAnswering, FramePreTrainedModel):
        base_class = FrameModel

    class FrameForMultipleChoice(tasks.ForMultipleChoice, FramePreTrainedModel):
        base_class = FrameModel

    return SimpleNamespace(
        Model=FrameModel,
        ForPreTraining=FrameForPreTraining,
        ForMaskedLM=FrameForMaskedLM,
        ForSequenceClassification=FrameForSequenceClassification,
        ForTokenClassification=FrameForTokenClassification,
        ForQuestionAnswering=FrameForQuestionAnswering,
        ForMultipleChoice=FrameForMultipleChoice,
    )


BERT = make_family("bert", BertLMHead, PooledClassificationHead)
ROBERTA = make_family("roberta", RobertaLMHead, DenseClassificationHead)

LENGTHS = [13, 9, 11]

# Task -> outputs of the model, True where they have one row a token.
TASKS = {
    "Model": {"last_hidden_state": True, "pooler_output": False},
    "ForPreTraining": {"prediction_logits": True, "seq_relationship_logits": False},
    "ForMaskedLM": {"logits": True},
    "ForSequenceClassification": {"logits": False},
    "ForTokenClassification": {"logits": True},
    "ForQuestionAnswering": {"start_logits": True, "end_logits": True},
    "ForMultipleChoice": {"logits": False},
}


def build(family: SimpleNamespace, task: str, backend: str = "sdpa", **overrides: Any) -> Any:
    """A model of a test family with random weights; RoBERTa's has its way of counting positions."""
    kind = {} if family is BERT else {"position_offset": None, "pad_token_id": 1}
    num_labels = {} if task == "ForQuestionAnswering" else {"num_labels": 3}
    config = FrameConfig(**{**TINY, **kind, **num_labels, **overrides}, attn_implementation=backend)
    return randomise_(getattr(family, task)(config))


def inputs_for(task: str, side: str = "right", pad: int = 0) -> dict[str, Tensor]:
    """Three examples of different length with token types, `pad` in the padding; three choices for multiple choice."""
    mask = mask_of(LENGTHS, max(LENGTHS), side)
    tokens = [random_ids(1, length, seed=length)[0] for length in LENGTHS]
    ids = torch.full(mask.shape, pad).masked_scatter(mask.bool(), torch.cat(tokens))
    types = torch.where(mask == 1, ids % 2, 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if task == "ForMultipleChoice":
        inputs = {name: torch.stack([x, x.roll(1, 0), x.roll(2, 0)], dim=1) for name, x in inputs.items()}
    return inputs


def labels_for(task: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    by_token = {"ForMaskedLM": 64, "ForPreTraining": 64, "ForTokenClassification": 3}
    if task in by_token:
        labels = {"labels": (ids * 7 % by_token[task]).masked_fill(mask == 0, -100)}
        return {**labels, "next_sentence_label": torch.tensor([0, 1, 1])} if task == "ForPreTraining" else labels
    if task == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([3, 99, 1]), "end_positions": torch.tensor([5, 8, 2])}
    return {} if task == "Model" else {"labels": torch.tensor([2, 0, 1])}
