"""What every mechanism shares: the projections, the split into heads, the choice of backend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..cpu import can_overwrite, linear_maps
from ..functional import dense_softmax_attention, softmax_attention


if TYPE_CHECKING:
    from transformers.cache_utils import Cache, CacheLayerMixin


class SelfAttention(nn.Module):
    """Multi-head self-attention around one formula. A subclass adds its weights here and implements `attend`.

    Args:
        config: has `hidden_size`, `num_attention_heads`, `attention_probs_dropout_prob` and `_attn_implementation`, and
            for the causal form `is_decoder`; `qkv_bias`, True where it is not there; `attention_head_size`, where heads
            are not a share of `hidden_size`.
        layer_idx: index of the layer, from 0.
        options: the mechanism's options, an `options_class`; a config that has them as fields by default.

    Raises:
        ValueError: `hidden_size` that the heads do not divide, or `is_decoder` where there is no causal form.
    """

    options_class: ClassVar[type | None] = None
    """Dataclass of the mechanism's options, inherited by the configs that show them; None if there are none."""

    backends: ClassVar[tuple[str, ...]] = ("eager", "sdpa")
    """The `attn_implementation` names this mechanism has; `eager` is the dense one that returns weights."""

    has_causal_form: ClassVar[bool] = False
    """Whether `is_decoder` gives a form in which no token attends a later one."""

    is_estimate: ClassVar[bool] = False
    """Whether its weights estimate those of full softmax attention: then every pair has one, and none is left out."""

    wants: ClassVar[tuple[str, ...]] = ()
    """What `attend` can use of a frame besides the states, by the name of the argument: `"global_tokens"`, `"grid"`."""

    has_overwriting_form: ClassVar[bool] = False
    """Whether `attend` takes `overwrite`: then it may use the memory of `query`, `key` and `value` for its result."""

    projections: ClassVar[tuple[str, ...]] = ("query", "key", "value")
    """The linear maps of the states that are split into heads."""

    def __init__(self, config: Any, layer_idx: int, options: Any = None) -> None:
        super().__init__()
        self.is_causal = bool(getattr(config, "is_decoder", False))
        if self.is_causal and not self.has_causal_form:
            raise ValueError(f"is_decoder = True: {type(self).__name__} has no causal form; leave it False.")
        self.config = config
        self.layer_idx = layer_idx
        self.options = config if options is None else options
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = getattr(config, "attention_head_size", None)
        if self.head_dim is None:
            if config.hidden_size % config.num_attention_heads != 0:
                raise ValueError(
                    f"hidden_size = {config.hidden_size} is not divisible by num_attention_heads = "
                    f"{config.num_attention_heads}; choose a multiple of the head count."
                )
            self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout_p = float(config.attention_probs_dropout_prob)
        width, bias = self.num_attention_heads * self.head_dim, getattr(config, "qkv_bias", True)
        for name in self.projections:
            self.add_module(name, nn.Linear(config.hidden_size, width, bias=bias))

    @classmethod
    def check(cls, options: Any, config: Any) -> None:
        """Raises `ValueError` for `options` that break a rule, or do not fit `config`."""
        if cls.options_class is not None:
            options.check_options()

    @classmethod
    def are_alike(cls, layers: Sequence[nn.Module]) -> bool:
        """Whether what layers need can be prepared for all at once: of this class, with the same options and heads."""
        return len(layers) > 0 and all(
            type(layer) is cls
            and layer.options is layers[0].options
            and layer.num_attention_heads == layers[0].num_attention_heads
            for layer in layers
        )

    def drawn_buffers(self) -> dict[str, Tensor]:
        """Buffers by name that follow from options and layer alone, for models that are built without values."""
        return {}

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[batch, heads, length, head_dim]` of `hidden_states` `[batch, length, hidden]`."""
        query, key, value = linear_maps(hidden_states, (self.query, self.key, self.value))
        return self.split(query), self.split(key), self.split(value)

    def split(self, projected: Tensor) -> Tensor:
        """`[batch, length, heads * head_dim]` -> `[batch, heads, length, head_dim]`."""
        return projected.unflatten(-1, (self.num_attention_heads, self.head_dim)).transpose(1, 2)

    @staticmethod
    def merge(mixed: Tensor) -> Tensor:
        """`[batch, heads, length, head_dim]` -> `[batch, length, heads * head_dim]`."""
        return mixed.transpose(1, 2).flatten(2)

    def forward(
        self, hidden_states: Tensor, key_padding_mask: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within `hidden_states` `[batch, length, hidden]`.

        Args:
            key_padding_mask: `[batch, length]` bool, True = attend; with a cache `[batch, cached + length]`.
            context: what the family's model prepared once for all layers, and `past_key_values`, the cache.

        Returns:
            `[batch, length, heads * head_dim]`, and from the eager backend the weights `[batch, heads, length, keys]`,
            else None.
        """
        backend = self.config._attn_implementation
        if backend not in self.backends:
            raise ValueError(
                f"attn_implementation = {backend!r} is not a backend of {type(self).__name__}; "
                f"choose one of {', '.join(self.backends)}."
            )
        query, key, value = self.project(hidden_states)
        dropout_p = self.dropout_p if self.training else 0.0
        if self.has_overwriting_form and self._is_alone(hidden_states, query, key, value, context):
            context["overwrite"] = True
        return self.attend(
            hidden_states, query, key, value, key_padding_mask, dropout_p=dropout_p, backend=backend, **context
        )

    def _is_alone(
        self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, context: dict[str, Any]
    ) -> bool:
        """Whether nobody else has what was projected; a cache would keep keys and values."""
        if context.get("past_key_values") is not None:
            return False
        made = ((query, self.query, key, value), (key, self.key, query, value), (value, self.value, query, key))
        return all(can_overwrite(*each, hidden_states) for each in made)

    def attend_fully(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, dropout_p: float, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        """Full softmax attention, as `attend` returns it."""
        if backend == "sdpa":
            return self.merge(softmax_attention(query, key, value, key_padding_mask, dropout_p=dropout_p)), None
        mixed, weights = dense_softmax_attention(query, key, value, key_padding_mask, dropout_p=dropout_p)
        return self.merge(mixed), weights

    def make_cache_layer(self) -> "CacheLayerMixin":
        """An empty cache for this layer; raises `ValueError` where there is no causal form."""
        raise ValueError(f"{type(self).__name__} has no causal form and therefore no cache.")

    def own_layer(self, past_key_values: "Cache") -> "CacheLayerMixin | None":
        """This layer's part of a cache, of whatever kind; None if it has fewer layers."""
        return past_key_values.layers[self.layer_idx] if self.layer_idx < len(past_key_values.layers) else None

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        *,
        dropout_p: float,
        backend: str,
        **context: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The mechanism itself; shapes as in `forward`, `query`, `key`, `value` split into heads."""
        raise NotImplementedError(f"{type(self).__name__} does not implement attend().")
