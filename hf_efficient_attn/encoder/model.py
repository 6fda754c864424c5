"""The base model of every encoder family, and what all its classes share."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,
    capture_outputs,
    maybe_install_capturing_hooks,
)

from ..cpu import can_overwrite
from .configuration import EffConfig, EffEncoderConfig
from .embeddings import Embeddings, positions_from_mask
from .heads import LMBias, PlainLMHead
from .inputs import as_bool_mask, check_forward_kwargs, check_ids, check_length, first_token, input_shape
from .layer import AttentionBlock, AttentionFactory, Encoder, EncoderLayer, Pooler
from .packing import Documents, find_documents
from .publishing import PublishedModel


class EffPreTrainedModel(PublishedModel, PreTrainedModel):
    """Flags, initialisation and checks of every class of this package. A family adds `config_class` and its prefix."""

    config: EffConfig
    supports_gradient_checkpointing = True
    # Layers only: accelerate shards each as a unit, and the embeddings in another way.
    _no_split_modules = ["EncoderLayer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": AttentionBlock}
    _keys_to_ignore_on_load_unexpected = [r"pooler\.", r"embeddings\.position_ids", r"(lm_head|predictions)\.bias$"]

    def __init__(self, config: EffConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, self.config_class):
            name = self.config_class.__name__
            types = (self.config_class.model_type, *self.config_class.original_model_types)
            raise ValueError(
                f"{type(self).__name__} got a {type(config).__name__}; it needs a {name}, such as "
                f"{name}.from_pretrained(folder), which reads folders of {', '.join(types)}."
            )
        # Fields may have been set since the config was built.
        config.check()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LMBias | PlainLMHead) and module.bias is not None:
            init.zeros_(module.bias)
        for name, value in module.drawn_buffers().items() if hasattr(module, "drawn_buffers") else ():
            init.copy_(getattr(module, name), value)


class RecordingModel:
    """A base model whose layers' outputs transformers records; mixed in before its `EffPreTrainedModel`."""

    def finish_init(self) -> None:
        """To be called once all modules are there."""
        self.post_init()
        # Not at the first call that records something: that call may be inside a compiled graph.
        maybe_install_capturing_hooks(self)

    def check_wanted_weights(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call with these arguments records attention weights; raises `ValueError` where there are none."""
        wants_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        if wants_weights and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions = True with attn_implementation = {self.config._attn_implementation!r}: only the "
                "eager backend has attention weights; load the model with attn_implementation='eager' or call "
                "model.set_attn_implementation('eager')."
            )
        return wants_weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_output_capturing_hooks_installed": False})
        # Otherwise made by `PreTrainedModel.__init__`, which loading a pickle does not call.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(self)), self._can_record_outputs)
        maybe_install_capturing_hooks(self)


class EffEncoderModel(RecordingModel):
    """Embeddings, encoder and pooler; mixed into a family's `Eff<Name>Model` before its `EffPreTrainedModel`.

    Args:
        config: the family's config.
        add_pooling_layer: have `pooler_output`.
        task: name of the head around this model, for defaults that depend on it; None for the bare model.
    """

    attention_class: ClassVar[AttentionFactory]
    """The family's mechanism, `(config, layer_idx) -> module`."""

    embeddings_class: ClassVar[Callable[[EffEncoderConfig], nn.Module]] = Embeddings
    """Its `forward` takes `inputs_embeds`, `position_ids` and `token_type_ids`."""

    encoder_class: ClassVar[Callable[[EffEncoderConfig, AttentionFactory], nn.Module]] = Encoder
    """The stack of layers."""

    pooler_class: ClassVar[Callable[[EffEncoderConfig], nn.Module]] = Pooler
    """The module that `pool` maps the state of the first token with."""

    def __init__(self, config: EffEncoderConfig, add_pooling_layer: bool = True, task: str | None = None) -> None:
        super().__init__(config)
        self.task = task
        self.embeddings = self.embeddings_class(config)
        projected = config.embedding_size is not None and config.embedding_size != config.hidden_size
        self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size) if projected else None
        self.encoder = self.encoder_class(config, self.attention_class)
        self.pooler = self.pooler_class(config) if add_pooling_layer else None
        self.add_parts(config)
        self.finish_init()

    def add_parts(self, config: EffEncoderConfig) -> None:
        """Modules that the family has besides; none by default."""

    def encode(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None,
        context: dict[str, Any],
        wants_weights: bool,
        overwrite: bool = False,
    ) -> Tensor:
        """All layers: `[batch, length, hidden]` -> `[batch, length, output_size]`.

        `context` is that of `attention_context`; `wants_weights` says that attention weights are recorded, `overwrite`
        that nobody else needs `hidden_states` any more or will need those of a layer. Of packed rows there is no mask,
        and the context has `documents` alone.
        """
        return self.encoder(hidden_states, key_padding_mask, overwrite=overwrite, **context)

    def pool(self, first_token: Tensor) -> Tensor:
        """`pooler_output` of the state of the first token, `[batch, hidden]` both."""
        return self.pooler(first_token)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    def key_padding_mask(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, int]
    ) -> Tensor | None:
        """The mask as bool `[batch, length]`, True = attend; None if every token counts."""
        mask = as_bool_mask("attention_mask", attention_mask, *shape)
        # A causal model takes no id for padding: a generated text may hold any, and a cache does not show those before.
        pad_marks = self.config.first_position > 0 and self.config.pad_token_id is not None
        if mask is None and input_ids is not None and pad_marks and not self.config.is_decoder:
            mask = input_ids != self.config.pad_token_id
        # Without padding nothing has to be kept out of it. Only where looking costs no synchronisation.
        looks = mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling()
        return None if looks and bool(mask.all()) else mask

    def attention_context(
        self,
        input_ids: Tensor | None,
        key_padding_mask: Tensor | None,
        global_attention_mask: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """What the family's mechanism wants prepared once for all layers; it gets them as keyword arguments.

        `shape` is `(batch, length)` of the input; the mask covers what came before it as well. The cache is None in
        encoders, and where none is wanted.
        """
        if global_attention_mask is not None:
            raise ValueError(
                f"{type(self).__name__} got global_attention_mask, but its attention has no global tokens; "
                "leave it out."
            )
        return {} if past_key_values is None else {"past_key_values": past_key_values}

    def _documents(
        self,
        document_ids: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        global_attention_mask: Tensor | None,
        shape: tuple[int, int],
    ) -> Documents:
        """The documents of packed rows, with what the mechanism wants prepared for each group of them."""
        documents = find_documents(document_ids, attention_mask, shape, self.config.max_input_length)
        is_global = as_bool_mask("global_attention_mask", global_attention_mask, *shape)
        groups = []
        for group in documents.groups:
            ids, marked = (None if x is None else group.take(x) for x in (input_ids, is_global))
            shape_of_group, device = tuple(group.index.shape), document_ids.device
            context = self.attention_context(ids, group.mask, marked, shape_of_group, device, None)
            groups.append(group._replace(context=context))
        return documents._replace(groups=tuple(groups))

    def make_cache(self) -> Cache:
        """An empty cache for the causal form, as `forward` makes it where none is given."""
        return Cache(layers=[attention.make_cache_layer() for attention in self.encoder.attentions()])

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None, packed: bool) -> Cache | None:
        """The cache of this call, or None; None with `packed` rows."""
        if not self.config.is_decoder:
            if past_key_values is not None:
                raise ValueError(
                    f"{type(self).__name__} got past_key_values, but it is an encoder: each call reads the whole "
                    "input. Leave it out, or load a causal model (is_decoder=True)."
                )
            return None
        if packed:
            if past_key_values is not None:
                raise ValueError(
                    f"{type(self).__name__} got document_ids and past_key_values: a cache goes on with one text a row; "
                    "leave out one of them."
                )
            return None
        # A cache of fixed size holds room that is no token yet, which a mechanism would count.
        if past_key_values is not None and (not isinstance(past_key_values, Cache) or past_key_values.is_compileable):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; give what the last call returned, or "
                "model.make_cache()."
            )
        # The decorator of `forward` puts config.use_cache in place of None. Nothing goes on from a training step.
        return self.make_cache() if past_key_values is None and use_cache and not self.training else past_key_values

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode a batch.

        Args:
            input_ids: `[batch, length]`, or `inputs_embeds` `[batch, length, embedding_size]` instead.
            attention_mask: `[batch, length]`, 1 at tokens and 0 at padding, on either side; ones if absent (if absent
                in a model with a position offset, `input_ids` other than `pad_token_id`).
            token_type_ids: `[batch, length]`, zeros if absent.
            position_ids: `[batch, length]` rows of the position table; by default the running count of the mask from
                `config.first_position`, so that padding on the left changes nothing.
            global_attention_mask: `[batch, length]`, 1 at global tokens, where the mechanism has them.
            past_key_values: in the causal form, what the last call returned (or `make_cache()`): the input goes on
                where that one ended, and `attention_mask` is `[batch, tokens before + length]`.
            use_cache: in the causal form, return the cache for the next call, except in training mode; by default
                `config.use_cache`.
            document_ids: `[batch, length]` integers for packed rows, several documents in one: 0 at padding (anywhere
                between documents), one positive number at all tokens of a document, which follow each other. The states
                of a document's tokens are those that it has in a row of its own: nothing attends another document,
                positions begin anew with each (where none are given), and each rule that depends on a length or on
                first tokens goes by the document. A row may be longer than the model's input, a document not. There is
                no cache, and no compiling or exporting; `DataCollatorWithPacking` makes such batches.
            kwargs: `output_hidden_states`, `output_attentions` (eager backend), `return_dict`.

        Returns:
            `last_hidden_state` `[batch, length, hidden]`, `pooler_output` `[batch, hidden]` or None, and if asked
            `hidden_states` (one more than layers) and `attentions` (`[batch, heads, length, keys]` each; keys are the
            input's tokens, and with a cache what the mechanism's eager backend holds of those before). The causal form
            also returns `past_key_values`. With `document_ids`, `pooler_output` is `[documents, hidden]`, row by row,
            and weights between documents are 0.

        Raises:
            ValueError: input that is missing, misshapen, too long, or would be ignored.
        """
        check_forward_kwargs(kwargs, type(self).__name__)
        wants_weights = self.check_wanted_weights(kwargs)
        past_key_values = self._cache(past_key_values, use_cache, document_ids is not None)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch, length = input_shape(input_ids, inputs_embeds, self.config)
        if document_ids is None:
            check_length(length, past_length, self.config)
        check_ids("input_ids", input_ids, batch, length, self.embeddings.word_embeddings.num_embeddings)
        check_ids("position_ids", position_ids, batch, length, self.config.max_position_embeddings)
        # Without a table all tokens are of the one type 0.
        check_ids("token_type_ids", token_type_ids, batch, length, max(1, self.config.type_vocab_size))
        device = input_ids.device if input_ids is not None else inputs_embeds.device
        if document_ids is None:
            documents = None
            key_padding_mask = self.key_padding_mask(input_ids, attention_mask, (batch, past_length + length))
            context = self.attention_context(
                input_ids, key_padding_mask, global_attention_mask, (batch, length), device, past_key_values
            )
            own_mask = None if key_padding_mask is None else key_padding_mask[:, past_length:]
        else:
            documents = self._documents(document_ids, input_ids, attention_mask, global_attention_mask, (batch, length))
            context, key_padding_mask, own_mask = {"documents": documents}, None, document_ids > 0

        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        elif own_mask is not None:
            # Not even inf or NaN in padding may reach a gradient.
            inputs_embeds = inputs_embeds.masked_fill(~own_mask[:, :, None], 0.0)
        if position_ids is None:
            first = self.config.first_position
            if documents is None:
                position_ids = positions_from_mask(key_padding_mask, length, first, device, past_length)
            else:
                position_ids = documents.position + first
        hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        if self.embeddings_project is not None:
            hidden_states = self.embeddings_project(hidden_states)
        keeps_states = bool(kwargs.get("output_hidden_states", self.config.output_hidden_states))
        overwrite = not keeps_states and can_overwrite(hidden_states, self, inputs_embeds)
        # Of a long text they are as much memory as its states.
        del inputs_embeds
        hidden_states = self.encode(hidden_states, key_padding_mask, context, wants_weights, overwrite)
        pooled = None
        if self.pooler is not None and documents is None:
            pooled = self.pool(first_token(hidden_states, own_mask))
        elif self.pooler is not None:
            pooled = self.pool(documents.first_states(hidden_states))
        if not self.config.is_decoder:
            return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=pooled, past_key_values=past_key_values
        )
