"""The published sizes of ELECTRA, with the hyperparameters of their pretraining."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ElectraSize:
    """One column of table 6 in Clark et al. 2020, arXiv 2003.10555.

    Args:
        num_hidden_layers, hidden_size, embedding_size, num_attention_heads, intermediate_size: of the discriminator.
        generator_size: width of the generator as a share of the discriminator's.
        mask_probability: share of the tokens that are masked.
        length: tokens of an input.
        learning_rate: peak, after `warmup_steps`, from where it falls linearly to 0 at `train_steps`.
        batch_size: inputs a step.
        layer_decay: factor of the learning rate from one layer to the next below it, in fine-tuning.
    """

    num_hidden_layers: int
    hidden_size: int
    embedding_size: int
    num_attention_heads: int
    intermediate_size: int
    generator_size: float
    mask_probability: float
    length: int
    learning_rate: float
    batch_size: int
    train_steps: int
    warmup_steps: int = 10_000
    weight_decay: float = 0.01
    adam_epsilon: float = 1e-6
    layer_decay: float = 0.8


_SMALL = (12, 256, 128, 4, 1024)

ELECTRA_SIZES: dict[str, ElectraSize] = {
    "small": ElectraSize(*_SMALL, 1 / 4, 0.15, 128, 5e-4, 128, 1_000_000),
    # As released: a generator of the discriminator's width, and longer inputs.
    "small++": ElectraSize(*_SMALL, 1.0, 0.15, 512, 5e-4, 128, 1_000_000),
    "base": ElectraSize(12, 768, 768, 12, 3072, 1 / 3, 0.15, 512, 2e-4, 256, 766_000),
    "large": ElectraSize(24, 1024, 1024, 16, 4096, 1 / 4, 0.25, 512, 2e-4, 2048, 400_000, layer_decay=0.9),
}
"""Name -> size. Adam has beta 0.9 and 0.999 everywhere."""


def electra_size(name: str) -> ElectraSize:
    """A row of `ELECTRA_SIZES`; raises `ValueError` for another name."""
    if name not in ELECTRA_SIZES:
        raise ValueError(f"size = {name!r}: choose one of {', '.join(ELECTRA_SIZES)}.")
    return ELECTRA_SIZES[name]
