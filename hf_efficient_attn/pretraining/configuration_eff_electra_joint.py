"""Config of the joint pretraining of a generator and a discriminator."""

import copy
import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from ..encoder.configuration import EffEncoderConfig, refuse_unknown
from ..models.eff_electra.configuration_eff_electra import EffElectraConfig
from .sizes import electra_size


SHARING = ("embeddings", "all", "none")
OBJECTIVES = ("electra", "electra_15", "replace_mlm", "all_tokens_mlm")
DETECTING = ("electra", "electra_15")
GENERATOR_TRAININGS = ("maximum_likelihood", "adversarial")
STAGES = ("joint", "generator", "discriminator")

# What says how large an encoder is, in the configs of this package and of transformers.
_WIDTHS = ("hidden_size", "dim")
_HEADS = ("num_attention_heads", "n_heads")
_INNER = ("intermediate_size", "hidden_dim")
_LAYERS = ("num_hidden_layers", "n_layers")


@strict
class EffElectraJointConfig(PreTrainedConfig):
    r"""
    Config of `EffElectraForJointPreTraining`: two encoders and an objective (Clark et al. 2020, arXiv 2003.10555).

    Args:
        generator: config of an encoder with a masked-LM head, of this package or of transformers, or a dict of one;
            by default that of ELECTRA-Small.
        discriminator: the same for the encoder that is to be pretrained.
        sharing: `"embeddings"` ties token, position and type embeddings of both; `"all"` all of the encoders' weights,
            which have to be of one size; `"none"`.
        objective: what the discriminator learns. `"electra"`: which tokens were replaced, among all. The others are the
            paper's ablations: `"electra_15"` only among those that were masked; `"replace_mlm"` the original tokens
            where some were masked; `"all_tokens_mlm"` the original tokens everywhere, with a copy mechanism.
        discriminator_weight: factor of the discriminator's loss; by default 50 where it detects, 1 where it predicts.
        generator_training: `"maximum_likelihood"`, or `"adversarial"`: the generator learns to raise the
            discriminator's loss, by REINFORCE with a learned baseline.
        temperature: the generator's logits are divided by it before sampling.
        stage: `"joint"`, or one of the two stages of two-stage training: `"generator"` trains the generator alone,
            `"discriminator"` the discriminator on samples of a frozen generator.
        sampling_seed: samples are a pure function of it and of each masked text, whatever the batch, rank or step; None
            takes torch's generator.

    Raises:
        ValueError: a value that breaks a rule above, vocabularies that differ, a causal model.

    Example:

    ```python
    >>> from hf_efficient_attn import EffElectraForJointPreTraining, EffElectraJointConfig, EffNystromformerConfig
    >>> config = EffElectraJointConfig.from_size("small", vocab_size=8000)
    >>> discriminator = EffNystromformerConfig(hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    >>> config = EffElectraJointConfig.from_discriminator(discriminator, generator_size=1 / 4)
    ```
    """

    model_type = "eff_electra_joint"
    sub_configs: ClassVar[dict[str, type]] = {"generator": AutoConfig, "discriminator": AutoConfig}
    # Both encoders bring theirs.
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "generator_loss",
        "discriminator_loss",
        "corrupted_ids",
        "counts",
    ]

    generator: PreTrainedConfig | dict | None = None
    discriminator: PreTrainedConfig | dict | None = None
    sharing: str = "embeddings"
    objective: str = "electra"
    discriminator_weight: float | int | None = None
    generator_training: str = "maximum_likelihood"
    temperature: float | int = 1.0
    stage: str = "joint"
    sampling_seed: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        EffEncoderConfig.prepare_first_use()
        if not kwargs.pop("_loaded_from_dict", False):
            refuse_unknown(self, kwargs)
        if self.discriminator is None:
            self.discriminator = EffElectraConfig()
        self.discriminator = _config_of("discriminator", self.discriminator)
        if self.generator is None:
            self.generator = generator_config(self.discriminator, 1 / 4)
        self.generator = _config_of("generator", self.generator)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EffElectraJointConfig":
        """As in transformers. Names that are no fields are kept as attributes: files may come from other versions."""
        return super().from_dict({**config_dict, "_loaded_from_dict": True}, **kwargs)

    @classmethod
    def from_discriminator(
        cls, discriminator: PreTrainedConfig, generator_size: float, *, generator_layers: float = 1.0, **options: Any
    ) -> "EffElectraJointConfig":
        """The config for `discriminator` with a generator of its kind, `generator_size` times as wide.

        `generator_layers` is the generator's share of the layers; `options` are the fields of this config. See
        `generator_config` for the rules.
        """
        generator = generator_config(discriminator, generator_size, generator_layers)
        return cls(generator=generator, discriminator=discriminator, **options)

    @classmethod
    def from_size(
        cls, size: str, *, family: type[PreTrainedConfig] = EffElectraConfig, options: Any = None, **fields: Any
    ) -> "EffElectraJointConfig":
        """A published size, see `ELECTRA_SIZES`, for encoders of `family`, a config class.

        `fields` are the encoders' (`vocab_size`, those of the attention, ...), `options`, a dict, those of this config.
        """
        row = electra_size(size)
        fields = {
            "num_hidden_layers": row.num_hidden_layers,
            "hidden_size": row.hidden_size,
            "embedding_size": row.embedding_size,
            "num_attention_heads": row.num_attention_heads,
            "intermediate_size": row.intermediate_size,
            **fields,
        }
        return cls.from_discriminator(family(**fields), row.generator_size, **(options or {}))

    @property
    def loss_weight(self) -> float:
        """Factor of the discriminator's loss."""
        if self.discriminator_weight is not None:
            return float(self.discriminator_weight)
        return 50.0 if self.detects else 1.0

    @property
    def detects(self) -> bool:
        """Whether the discriminator tells replaced tokens from original ones."""
        return self.objective in DETECTING

    @property
    def vocab_size(self) -> int:
        """Tokens of both encoders."""
        return self.discriminator.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the discriminator."""
        return self.discriminator.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the discriminator."""
        return self.discriminator.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Heads of the discriminator."""
        return self.discriminator.num_attention_heads

    @property
    def initializer_range(self) -> float:
        """Standard deviation of new weights."""
        return getattr(self.discriminator, "initializer_range", 0.02)

    @property
    def pad_token_id(self) -> int | None:
        """Id of padding, None if neither encoder has one."""
        own = getattr(self.discriminator, "pad_token_id", None)
        return getattr(self.generator, "pad_token_id", None) if own is None else own

    @pad_token_id.setter
    def pad_token_id(self, value: int | None) -> None:
        """As Trainer does where a tokenizer says otherwise."""
        self.generator.pad_token_id = self.discriminator.pad_token_id = value

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule; also called when a model is built from this config."""
        choices = {
            "sharing": SHARING,
            "objective": OBJECTIVES,
            "generator_training": GENERATOR_TRAININGS,
            "stage": STAGES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        for name in ("generator", "discriminator"):
            if not hasattr(getattr(self, name), "vocab_size"):
                raise ValueError(f"the {name} is a {type(getattr(self, name)).__name__}, which reads no text.")
        if self.generator.vocab_size != self.discriminator.vocab_size:
            raise ValueError(
                f"the generator has {self.generator.vocab_size} tokens and the discriminator "
                f"{self.discriminator.vocab_size}; both read the same text: give them the vocab_size of one tokenizer."
            )
        for name in ("generator", "discriminator"):
            if getattr(getattr(self, name), "is_decoder", False):
                raise ValueError(f"the {name} has is_decoder = True, but its tokens attend later ones; set it False.")
        if not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(
                f"temperature = {self.temperature}: give a number from 0.001 to 1000; 1 samples as the generator says."
            )
        weight = self.discriminator_weight
        if weight is not None and not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"discriminator_weight = {weight}: it must be 0 or more, and finite.")
        if self.sampling_seed is not None and not 0 <= self.sampling_seed < 2**63:
            raise ValueError(f"sampling_seed = {self.sampling_seed}: give a number from 0 to 2 ** 63 - 1, or None.")
        if not self.tie_word_embeddings and self.sharing != "none":
            raise ValueError(
                f"tie_word_embeddings = False with sharing = {self.sharing!r}: it unties everything; set sharing = "
                "'none', and tie_word_embeddings in the configs of the two encoders."
            )
        if self.generator_training == "adversarial" and not self.detects:
            raise ValueError(
                f"generator_training = 'adversarial' with objective = {self.objective!r}: the reward is how badly "
                "replaced tokens are detected; choose objective = 'electra' or 'electra_15'."
            )
        if self.stage != "joint" and self.sharing != "none":
            raise ValueError(
                f"stage = {self.stage!r} with sharing = {self.sharing!r}: one model stands still while the other one "
                "learns, so nothing can be shared; set sharing = 'none'."
            )
        if self.stage != "joint" and self.generator_training == "adversarial":
            raise ValueError(
                f"stage = {self.stage!r} with generator_training = 'adversarial': a generator learns from the "
                "discriminator only where both are trained; set stage = 'joint'."
            )


def _config_of(name: str, given: PreTrainedConfig | dict) -> PreTrainedConfig:
    """A config object; raises `ValueError` for a dict that does not say of which model."""
    if isinstance(given, PreTrainedConfig):
        return given
    if "model_type" not in given:
        raise ValueError(f"{name} is a dict without 'model_type'; give a config object, or the to_dict() of one.")
    return AutoConfig.for_model(**given)


def _field(config: PreTrainedConfig, names: tuple[str, ...]) -> str:
    """The one of `names` that is a field of `config`."""
    for name in names:
        if name in type(config).__dataclass_fields__:
            return name
    raise ValueError(
        f"{type(config).__name__} has none of {', '.join(names)}, so that no generator can be derived from it; build "
        "one yourself and give EffElectraJointConfig(generator=..., discriminator=...)."
    )


def generator_config(discriminator: PreTrainedConfig, size: float, layers: float = 1.0) -> PreTrainedConfig:
    """A generator for `discriminator`: the same config, `size` times as wide and with `layers` times the layers.

    As published: the width is rounded to a whole number of heads as wide as the discriminator's, there is at least one
    head, and the feed-forward layer is 4 times as wide. Embeddings keep the discriminator's width, for sharing; where
    a config cannot project embeddings (BERT's own), they have the width of the generator, which rules sharing out.

    Raises:
        ValueError: a size or share of layers outside (0, 1], or a config that does not say its width.
    """
    for name, value in (("generator_size", size), ("generator_layers", layers)):
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(
                f"{name} = {value!r}: the generator is a share of the discriminator, above 0 and at most 1."
            )
    width, heads, inner, depth = (_field(discriminator, names) for names in (_WIDTHS, _HEADS, _INNER, _LAYERS))
    config = copy.deepcopy(discriminator)
    full = getattr(discriminator, width)
    if "embedding_size" in type(config).__dataclass_fields__:
        config.embedding_size = discriminator.embedding_size or full
    if size < 1:
        head_dim = max(1, full // getattr(discriminator, heads))
        count = max(1, round(full * size / head_dim))
        setattr(config, heads, count)
        setattr(config, width, count * head_dim)
        setattr(config, inner, 4 * count * head_dim)
    before, after = getattr(discriminator, depth), max(1, round(getattr(discriminator, depth) * layers))
    for field in type(config).__dataclass_fields__:
        value = getattr(config, field)
        if isinstance(value, list) and len(value) == before > after:  # one entry a layer
            setattr(config, field, value[:after])
    setattr(config, depth, after)
    if hasattr(config, "check"):
        config.check()
    return config


__all__ = ["EffElectraJointConfig", "generator_config"]
