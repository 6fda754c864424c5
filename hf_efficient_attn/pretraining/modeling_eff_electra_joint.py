"""A generator and a discriminator in one model, trained together."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from ..encoder.inputs import check_forward_kwargs, check_ids, check_labels
from ..encoder.packing import check_document_ids
from ..encoder.publishing import PublishedModel
from .configuration_eff_electra_joint import EffElectraJointConfig
from .objectives import adversarial_losses, copy_nll, detection_losses, mean, token_nll
from .outputs import COUNTS, EffElectraJointOutput
from .parts import inputs_for, logits_at, make_detector, make_masked_lm, padding_mask
from .sampling import row_seeds, sample_tokens
from .saving import PairFolders
from .sharing import tied_names, units_that_share_nothing


class EffElectraForJointPreTraining(PairFolders, PublishedModel, PreTrainedModel):
    """ELECTRA's pretraining (Clark et al. 2020, arXiv 2003.10555): replaced-token detection, on any encoder.

    The generator predicts masked tokens; samples of it stand in their place in what the discriminator reads, which
    learns which tokens are not the original ones. `config` names both encoders, of this package or of transformers, the
    weights they share and the objective. Afterwards `save_discriminator` writes the encoder to fine-tune.

    Args:
        config: an `EffElectraJointConfig`.

    Raises:
        ValueError: a rule of the config that is broken, or weights that are to be shared and do not fit.

    Example:

    ```python
    >>> model = EffElectraForJointPreTraining(EffElectraJointConfig.from_size("small", vocab_size=len(tokenizer)))
    >>> collator = DataCollatorForReplacedTokenDetection(tokenizer)
    >>> ElectraTrainer(model, arguments, train_dataset=data, data_collator=collator).train()
    >>> model.save_discriminator("my-electra")
    ```
    """

    config: EffElectraJointConfig
    config_class = EffElectraJointConfig
    base_model_prefix = "electra_joint"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = False
    """Read by Trainer: both losses are means of a batch, as in the released code."""

    def __init__(self, config: EffElectraJointConfig) -> None:
        if not isinstance(config, EffElectraJointConfig):
            raise ValueError(f"{type(self).__name__} needs an EffElectraJointConfig, got a {type(config).__name__}.")
        config.check()
        super().__init__(config)
        self.generator = make_masked_lm("generator", config.generator)
        second = config.discriminator
        self.discriminator = make_detector(second) if config.detects else make_masked_lm("discriminator", second)
        # One object each, so that what is changed later, such as the vocabulary, is saved.
        config.generator, config.discriminator = self.generator.config, self.discriminator.config
        self.copy_head = nn.Linear(_width(self.discriminator), 1) if config.objective == "all_tokens_mlm" else None
        adversarial = config.generator_training == "adversarial"
        self.baseline = nn.Linear(_width(self.generator), 1) if adversarial else None
        self._tied_weights_keys = tied_names(self.generator, self.discriminator, config.sharing)
        self.post_init()
        # Trainer warns about tied names that a checkpoint lacks, unless they stand here.
        self._keys_to_ignore_on_save = set(self.all_tied_weights_keys)
        self._fsdp_plan = units_that_share_nothing(self._fsdp_plan, self.all_tied_weights_keys)
        self._freeze_what_waits()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every loaded weight one that learns."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_what_waits()
        return loaded

    def _freeze_what_waits(self) -> None:
        """In two stages only one of the two learns."""
        waiting = {"generator": self.discriminator, "discriminator": self.generator}.get(self.config.stage)
        if waiting is not None:
            waiting.requires_grad_(False)

    def begin_discriminator_stage_(self) -> None:
        """Go from the first stage of two-stage training to the second.

        The discriminator's encoder starts with the generator's weights, and the generator stands still from now on.
        Train on with a new Trainer: the old one's optimizer has the generator's weights.

        Raises:
            ValueError: not in the first stage, or encoders that are not of one size.
        """
        if self.config.stage != "generator":
            raise ValueError(
                f"stage = {self.config.stage!r}: the second stage follows the first one; build the model with "
                "stage = 'generator'."
            )
        try:
            names = tied_names(self.generator, self.discriminator, "all")
        except ValueError as error:
            raise ValueError(
                "the discriminator starts with the generator's weights, which takes encoders of one size: derive the "
                f"generator with generator_size = 1 ({error})"
            ) from None
        with torch.no_grad():
            for ours, theirs in names.items():
                self.get_parameter(theirs).copy_(self.get_parameter(ours))
        self.config.stage = "discriminator"
        self.discriminator.requires_grad_(True)
        self._freeze_what_waits()

    def get_input_embeddings(self) -> nn.Module:
        """The discriminator's word embeddings."""
        return self.discriminator.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings, of both where they are shared."""
        self.discriminator.base_model.set_input_embeddings(value)
        if self.config.sharing != "none":
            self.generator.base_model.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers, for both encoders."""
        self.generator.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        # An encoder of transformers is resized without its head.
        own_class = isinstance(self.discriminator, PreTrainedModel)
        second = self.discriminator if own_class else self.discriminator.base_model
        second.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.tie_weights()
        return self.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> EffElectraJointOutput:
        """Corrupt a masked text and learn from it.

        Args:
            input_ids: `[batch, length]`, with mask tokens; a collator for masked language modelling makes them.
            attention_mask: `[batch, length]`, 1 at tokens and 0 at padding, on either side; without it padding is where
                `config.pad_token_id` stands.
            token_type_ids, position_ids, global_attention_mask: `[batch, length]`, for encoders that take them.
            labels: `[batch, length]`, the original tokens where they are predicted, -100 elsewhere. Without labels the
                discriminator reads `input_ids` as they are.
            document_ids: `[batch, length]`, for packed rows, where both encoders are of this package; see its base
                models. What is counted or sampled for each text is so for each row.

        Returns:
            The losses, what the discriminator read and said, and counts; see `EffElectraJointOutput`.

        Raises:
            ValueError: shapes that do not fit, labels outside the vocabulary, an argument that would be ignored.
        """
        check_forward_kwargs(kwargs, type(self).__name__)
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"{name} = True: ask model.generator or model.discriminator for them, there are two.")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, length], got shape {list(input_ids.shape)}.")
        check_ids("input_ids", input_ids, *input_ids.shape, self.config.vocab_size)
        input_ids = input_ids.long()
        if document_ids is not None:
            check_document_ids(document_ids, input_ids.shape)
            # A mask that says otherwise is refused by the encoders.
            attention_mask = document_ids > 0 if attention_mask is None else attention_mask
        keep = padding_mask(input_ids, attention_mask, self.config.pad_token_id)
        given = {
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "global_attention_mask": global_attention_mask,
            "document_ids": document_ids,
        }
        if labels is None:
            return EffElectraJointOutput(discriminator_logits=self._detect(input_ids, keep, given))
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels must be [batch, length] = {list(input_ids.shape)}, got {list(labels.shape)}.")
        if labels.dtype == torch.bool:
            raise ValueError(
                "labels are torch.bool; these are the original tokens where they are predicted, else -100."
            )
        check_labels("labels", labels, self.config.vocab_size, "these are the original tokens.")
        masked = (labels != -100) & keep
        original = torch.where(masked, labels, input_ids)

        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.stage != "discriminator"):
            logits, states = self._generate(input_ids, keep, masked, given)
        # Only an adversarial generator learns from what it sampled.
        drawn_from = self._drawn_from(logits.detach() if self.baseline is None else logits)
        sampled = self._sample(drawn_from, original, keep, masked)
        corrupted = original.masked_scatter(masked, sampled)
        is_replaced = (corrupted != original) & keep
        targets = original[masked]
        counts = {
            "texts": torch.tensor(len(input_ids), device=logits.device),
            "tokens": keep.sum(),
            "masked": masked.sum(),
            "generator_correct": (logits.argmax(dim=-1) == targets).sum(),
            "replaced": is_replaced.sum(),
        }
        found: Tensor | None = None
        if self.config.stage == "generator":
            discriminator_loss = torch.zeros((), device=logits.device)
        elif self.config.detects:
            found = self._detect(corrupted, keep, given)
            counts |= _detection_counts(found[keep] > 0, is_replaced[keep])
            losses = detection_losses(found, is_replaced)
            discriminator_loss = mean(losses[masked if self.config.objective == "electra_15" else keep])
        else:
            discriminator_loss = self._predict(corrupted, original, keep, masked, given)
        if self.baseline is None:
            generator_loss = mean(token_nll(logits, targets))
        else:
            generator_loss = self._adversarial_loss(drawn_from, states, sampled, losses[masked].detach())
        parts = {"generator": generator_loss, "discriminator": self.config.loss_weight * discriminator_loss}
        counts["generator_loss"] = generator_loss.detach() * len(input_ids)
        counts["discriminator_loss"] = discriminator_loss.detach() * len(input_ids)
        zero = counts["texts"] * 0
        return EffElectraJointOutput(
            loss=parts.get(self.config.stage, sum(parts.values())),
            discriminator_logits=found,
            is_replaced=is_replaced.long().masked_fill(~keep, -100),
            generator_loss=generator_loss,
            discriminator_loss=discriminator_loss,
            corrupted_ids=corrupted,
            counts=torch.stack([counts.get(name, zero).float() for name in COUNTS]),
        )

    def _generate(
        self, ids: Tensor, keep: Tensor, masked: Tensor, given: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """The generator's logits `[tokens, vocab_size]` and states `[tokens, hidden]` at masked tokens."""
        return logits_at(
            self.generator, masked, input_ids=ids, attention_mask=keep.long(), **inputs_for(self.generator, given)
        )

    def _drawn_from(self, logits: Tensor) -> Tensor:
        """Logits of the distribution that is sampled: at the temperature, and never padding.

        A token of padding in the middle of a text would move all positions after it where they go by the ids (RoBERTa).
        """
        logits = logits / self.config.temperature
        pad = self.config.pad_token_id
        return logits if pad is None else logits.index_fill(-1, torch.tensor([pad], device=logits.device), -torch.inf)

    def _sample(self, logits: Tensor, original: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """A token for each masked one, `[tokens]`."""
        seed = self.config.sampling_seed
        seeds = None if seed is None else row_seeds(seed, original, keep, masked)
        return sample_tokens(logits, masked.sum(dim=1).tolist(), seeds)

    def _detect(self, ids: Tensor, keep: Tensor, given: dict[str, Tensor | None]) -> Tensor:
        """The discriminator's logits `[batch, length]`, above 0 = replaced."""
        if not self.config.detects:
            raise ValueError(
                f"objective = {self.config.objective!r}: this discriminator predicts tokens, which takes labels."
            )
        inputs = inputs_for(self.discriminator, given)
        return self.discriminator(input_ids=ids, attention_mask=keep.long(), return_dict=True, **inputs)[0]

    def _adversarial_loss(self, logits: Tensor, states: Tensor, sampled: Tensor, rewards: Tensor) -> Tensor:
        """What a generator learns from that is to have its samples detected badly; `logits` are of what was sampled."""
        # The baseline predicts rewards; it is not to shape the states it reads.
        baseline_logits = self.baseline(states.detach()).squeeze(-1)
        policy, fit = adversarial_losses(logits, sampled, rewards, baseline_logits)
        return mean(policy) + mean(fit)

    def _predict(
        self, corrupted: Tensor, original: Tensor, keep: Tensor, masked: Tensor, given: dict[str, Tensor | None]
    ) -> Tensor:
        """Loss of a discriminator that predicts the original tokens: all of them, or those that were masked."""
        where = keep if self.copy_head is not None else masked
        inputs = {"input_ids": corrupted, "attention_mask": keep.long(), **inputs_for(self.discriminator, given)}
        logits, states = logits_at(self.discriminator, where, **inputs)
        targets = original[where]
        if self.copy_head is None:
            return mean(token_nll(logits, targets))
        return mean(copy_nll(logits, self.copy_head(states).squeeze(-1), corrupted[where], targets))


def _width(model: nn.Module) -> int:
    """Width of an encoder's last states."""
    config = model.config
    return getattr(config, "output_size", None) or config.hidden_size


def _detection_counts(called: Tensor, is_replaced: Tensor) -> dict[str, Tensor]:
    """Of tokens `[tokens]` that were called replaced or not, and are or are not: both bool."""
    return {
        "replaced_found": (called & is_replaced).sum(),
        "replaced_missed": (~called & is_replaced).sum(),
        "original_found": (~called & ~is_replaced).sum(),
        "original_missed": (called & ~is_replaced).sum(),
    }


__all__ = ["EffElectraForJointPreTraining"]
