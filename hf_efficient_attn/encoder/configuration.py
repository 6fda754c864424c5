"""Config fields that every family shares, their checks, and loading of an original family's config."""

import difflib
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .publishing import PublishedConfig


# What configs on the Hub and the library itself pass besides declared fields, without meaning for an encoder.
_LIBRARY_NAMES = frozenset(
    """
    model_type num_labels name_or_path torch_dtype attn_implementation experts_implementation output_attentions
    per_layer_config auto_map tokenizer_class task_specific_params finetuning_task prefix use_bfloat16
    torchscript pruned_heads tie_encoder_decoder cross_attention_hidden_size decoder_start_token_id cls_token_id
    mask_token_id unk_token_id sep_token_id bos_token_id eos_token_id pad_token_id quantization_config
    transformers_weights problem_type is_encoder_decoder gradient_checkpointing
    """.split()
)


_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def fsdp_plan(*modules: str) -> dict[str, str]:
    """Which modules of a base model FSDP2 gathers one at a time, by patterns such as `encoder.layer.*`.

    What is in none of them is gathered for the whole call. transformers moves word embeddings there by itself where a
    head shares them, and uses them again.
    """
    return dict.fromkeys(modules, "free_full_weight")


def tp_plan(layers: str, first: str, second: str) -> dict[str, str]:
    """How tensor parallelism splits a base model: the two halves of each layer's feed-forward part, by their names.

    Attention stays whole on every rank: hashes, random blocks, dilations and kernels go by the number of a head.
    """
    return {f"{layers}.{first}": "colwise", f"{layers}.{second}": "rowwise"}


@strict
class EffConfig(PublishedConfig, PreTrainedConfig):
    r"""
    Fields of the layers that every model of this package has, their checks, and loading of an original's config.

    Args:
        hidden_size: width of the encoder; a multiple of `num_attention_heads`.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads.
        intermediate_size: width of the feed-forward layer.
        hidden_act: its activation.
        hidden_dropout_prob: dropout of embeddings and layer outputs.
        attention_probs_dropout_prob: dropout of attention probabilities.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: epsilon of the layer norms.
        chunk_above: in inference longer inputs go through embeddings, output projections and feed-forward layers some
            thousand tokens at a time, whose inner states would take more memory than all else. On a CPU, where it is
            quicker, all above 1,024 tokens do.

    Raises:
        ValueError: a value that breaks a rule above, or an argument that is no option (with the nearest name).
    """

    original_model_types: ClassVar[tuple[str, ...]] = ()
    """Model types of transformers whose folders this config reads as its own, without a warning."""

    original_fields_without_meaning: ClassVar[tuple[str, ...]] = ()
    """Fields of those configs that say nothing about the model."""

    base_model_fsdp_plan: ClassVar[dict[str, str]] = fsdp_plan("encoder.layer.*")
    base_model_tp_plan: ClassVar[dict[str, str]] = tp_plan("encoder.layer.*", "intermediate.dense", "output.dense")

    before_first_use: ClassVar[list[Callable[[], None]]] = []
    """Called once, before the first config exists: where the package registers its model classes lazily."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    chunk_above: int = 65536

    def __post_init__(self, **kwargs: Any) -> None:
        self.prepare_first_use()
        loaded = kwargs.pop("_loaded_from_dict", False)
        for name in self.original_fields_without_meaning:
            kwargs.pop(name, None)
        if not loaded:
            refuse_unknown(self, kwargs)
        super().__post_init__(**kwargs)
        self.check()

    @staticmethod
    def prepare_first_use() -> None:
        """Does what `before_first_use` holds."""
        while EffConfig.before_first_use:
            EffConfig.before_first_use.pop()()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EffConfig":
        """As in transformers. Names that are no fields are kept as attributes: files may come from other versions."""
        return super().from_dict({**config_dict, "_loaded_from_dict": True}, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As in transformers; a config of `original_model_types` is read as this one."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") in cls.original_model_types:
            config_dict = {**cls.convert_original(config_dict), "model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def convert_original(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The values of a config of `original_model_types` in this config's conventions, where those differ."""
        return config_dict

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule; also called when a model is built from this config."""
        own_width = getattr(self, "attention_head_size", None) is not None
        if self.num_attention_heads < 1 or (self.hidden_size % self.num_attention_heads != 0 and not own_width):
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not divisible by num_attention_heads = "
                f"{self.num_attention_heads}; choose a multiple of the head count."
            )
        self.check_positive("hidden_size", "num_hidden_layers", "intermediate_size", "chunk_above")
        if self.problem_type is not None and self.problem_type not in _PROBLEM_TYPES:
            raise ValueError(
                f"problem_type = {self.problem_type!r}: choose one of {', '.join(_PROBLEM_TYPES)}, or None to go by "
                "the labels."
            )
        self.check_probabilities("hidden_dropout_prob", "attention_probs_dropout_prob")
        self.check_activation("hidden_act")

    def check_positive(self, *names: str) -> None:
        """Raises `ValueError` for a field below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be 1 or more.")

    def check_probabilities(self, *names: str) -> None:
        """Raises `ValueError` for a field that is neither None nor a probability."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} = {value}: a probability lies between 0 and 1.")

    def check_activation(self, name: str) -> None:
        """Raises `ValueError` for a field that names no activation."""
        from transformers.activations import ACT2FN  # loads a good part of transformers: not before a config exists

        value = getattr(self, name)
        if value not in ACT2FN:
            near = difflib.get_close_matches(value, ACT2FN, n=3) or ["gelu", "relu"]
            raise ValueError(f"{name} = {value!r} is not an activation; try {', '.join(near)}.")


def refuse_unknown(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for an argument that is no field of `config`, with the nearest name."""
    names = {field.name for field in fields(config)}
    known = _LIBRARY_NAMES | set(config.attribute_map)
    unknown = [name for name in kwargs if name not in known and not name.startswith("_")]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "set it as an attribute after the config is built."
        raise ValueError(f"{type(config).__name__} has no option {unknown[0]!r}; {hint}")


@strict
class EffEncoderConfig(EffConfig):
    r"""
    Fields shared by every text family of this package, besides those of `EffConfig`. A family adds its mechanism's
    options.

    Args:
        vocab_size: number of tokens.
        embedding_size: width of the embeddings, projected to `hidden_size` where it differs; None is `hidden_size`.
        classifier_dropout: dropout in the task heads; None is `hidden_dropout_prob`.
        head_act: activation of the heads' dense layer (of the pooler, where that is the layer); None is the published
            one of the family. What converts a checkpoint of another family sets it where the two differ.
        max_position_embeddings: rows of the position table, reserved ones included.
        position_offset: row of the first token's position. BERT has 0; None is `pad_token_id + 1` as in RoBERTa. With
            an offset, pad ids stand for the attention mask where none is given.
        type_vocab_size: number of token types, 0 for no table.
        rescale_embeddings: multiply word embeddings by the root of their width.
        norm_position: `"post"` as in BERT, or `"pre"` with a final norm.
        pad_token_id, bos_token_id, eos_token_id, sep_token_id: ids of special tokens.
        tie_word_embeddings: share the input embeddings with the masked-LM head.
        is_decoder: no token attends a later one; for the base model and causal language modelling, in families that
            have a causal form.
        use_cache: in the causal form, return keys and values for the next call, except in training mode.
        skip_logits: in training with labels, models that predict tokens give their loss alone, without logits: those
            are computed for labelled tokens only, some at a time, and again in the backward pass.
        add_cross_attention: must be False, there is none.

    Raises:
        ValueError: a value that breaks a rule above, or an argument that is no option (with the nearest name).
    """

    has_causal_form: ClassVar[bool] = False
    """Whether `is_decoder` may be True."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    """Outputs that Trainer does not gather in evaluation."""

    base_model_fsdp_plan: ClassVar[dict[str, str]] = fsdp_plan("embeddings.word_embeddings", "encoder.layer.*")

    vocab_size: int = 30522
    embedding_size: int | None = None
    classifier_dropout: float | int | None = None
    head_act: str | None = None
    max_position_embeddings: int = 512
    position_offset: int | None = 0
    type_vocab_size: int = 2
    rescale_embeddings: bool = False
    norm_position: str = "post"
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    sep_token_id: int | None = None
    tie_word_embeddings: bool = True
    is_decoder: bool = False
    use_cache: bool = True
    skip_logits: bool = False
    add_cross_attention: bool = False

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token of an example uses."""
        if self.position_offset is not None:
            return self.position_offset
        return 0 if self.pad_token_id is None else self.pad_token_id + 1

    @property
    def max_input_length(self) -> int:
        """Longest input in tokens."""
        return self.max_position_embeddings - self.first_position

    @property
    def output_size(self) -> int:
        """Width of the last states."""
        return self.hidden_size

    @property
    def head_dropout(self) -> float:
        """Dropout of the task heads."""
        return float(self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout)

    def check(self) -> None:
        """See `EffConfig.check`."""
        super().check()
        self.check_positive("vocab_size", "max_position_embeddings")
        for name in ("type_vocab_size", "position_offset"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be 0 or more.")
        if self.embedding_size is not None and self.embedding_size < 1:
            raise ValueError(f"embedding_size = {self.embedding_size}: it must be 1 or more, or None (hidden_size).")
        self.check_probabilities("classifier_dropout")
        if self.head_act is not None:
            self.check_activation("head_act")
        if self.norm_position not in ("post", "pre"):
            raise ValueError(f"norm_position = {self.norm_position!r}: choose 'post' (BERT) or 'pre'.")
        if self.max_input_length < 1:
            raise ValueError(
                f"max_position_embeddings = {self.max_position_embeddings} leaves no row for a token, because the "
                f"first {self.first_position} rows are reserved; give at least {self.first_position + 1}."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id = {self.pad_token_id} is outside the vocabulary of {self.vocab_size}; "
                "give an id of the tokenizer, or None."
            )
        if self.is_decoder and not self.has_causal_form:
            raise ValueError(f"is_decoder = True: {self.model_type} has no causal form; leave it False.")
        if self.add_cross_attention:
            raise ValueError(f"add_cross_attention = True: {self.model_type} has no cross-attention; leave it False.")
