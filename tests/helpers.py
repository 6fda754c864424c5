"""What several test files share: tiny configs and tokenizers, random weights, and silence as something to test."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from hf_efficient_attn import FAMILIES


# Small, but with several heads, layers and blocks that can be mixed up. Dropout is off so that train() and eval()
# compute the same.
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# What vision families have in place of a vocabulary: a grid that is no square.
TINY_IMAGES = {"image_size": [16, 12], "patch_size": 4, "encoder_stride": 4, "num_channels": 3}

# Options of mechanisms, for the families that have them: inputs of some tens of tokens should not fit into one window.
TINY_OPTIONS = {
    "attention_window": [8, 4],
    "block_size": 8,
    "num_random_blocks": 2,
    "num_landmarks": 8,
    "conv_kernel_size": 5,
    "num_features": 20,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 16,
    "num_hashes": 2,
    "summary_last_dropout": 0.0,
    "sep_token_id": 2,  # some defaults lie beyond the tiny vocabulary
}

# What Python itself does not show by default.
_HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


# In place of an Auto class, which there is none of: the head that detects replaced tokens.
DETECTOR = "ReplacedTokenDetection"


def config_class(family: str) -> type:
    """The config class of a row of `FAMILIES`."""
    row = FAMILIES[family]
    return getattr(row.module("configuration"), row.config_name)


def model_class(family: str, auto_name: str) -> type:
    """The model class that a row of `FAMILIES` has for an Auto class, or for `DETECTOR`."""
    row = FAMILIES[family]
    return getattr(row.module("modeling"), row.detector_name if auto_name == DETECTOR else row.model_names[auto_name])


def tiny_config(family: str, **overrides: Any) -> Any:
    """A config of `family` for hidden size 32, 2 layers, 4 heads; `overrides` win."""
    cls = config_class(family)
    known = {field.name for field in fields(cls)}
    options = {**TINY, **TINY_IMAGES, **TINY_OPTIONS}
    return cls(**{**{name: value for name, value in options.items() if name in known}, **overrides})


def one_layer(family: str) -> dict[str, Any]:
    """What makes `tiny_config(family)` one of a single layer."""
    kinds = {"eff_longformer": {"attention_window": 8}, "eff_reformer": {"attn_layers": ["lsh"]}}
    return {"num_hidden_layers": 1, **kinds.get(family, {})}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The encoder layers of a model, by whichever of the published names."""
    encoder = model.base_model.encoder
    return list(encoder.layer if hasattr(encoder, "layer") else encoder.layers)


def feed_forward_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """First and second half of a layer's feed-forward part."""
    if hasattr(layer, "intermediate"):
        return layer.intermediate, layer.output
    return layer.feed_forward.dense, layer.feed_forward.output


def randomise_(model: nn.Module, std: float = 0.2, seed: int = 0) -> nn.Module:
    """Every parameter from a normal distribution, biases and norms too (norm weights around 1); `model` in eval mode.

    Fresh models have zero biases and unit norms, which hide a bias that is forgotten or added twice.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                mean = 1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(mean + std * noise)
    return model.eval()


def random_ids(batch: int, length: int, *, vocab_size: int = 64, seed: int = 0, lowest: int = 5) -> Tensor:
    """`[batch, length]` ids from `lowest` on, so that none is a special token."""
    return torch.randint(lowest, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_images(batch: int, height: int = 16, width: int = 12, *, seed: int = 0) -> Tensor:
    """`[batch, 3, height, width]` pixels."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: list[int], length: int, side: str = "right") -> Tensor:
    """`[batch, length]` int64 attention mask with `lengths` tokens an example and padding on `side`."""
    position = torch.arange(length)[None]
    if side == "left":
        position = length - 1 - position
    return (position < torch.tensor(lengths)[:, None]).long()


def tiny_tokenizer(max_length: int = 100) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 280 tokens with RoBERTa's special tokens (ids 0 to 4) and template, trained on the spot."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog", "a window of attention"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def tiny_wordpieces(max_length: int = 100) -> transformers.BertTokenizer:
    """BERT's kind of tokenizer, for a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "quick", "brown", "fox", "dog", "##s"]
    return transformers.BertTokenizer(
        vocab={word: number for number, word in enumerate(words)}, model_max_length=max_length
    )


def tiny_unigrams(max_length: int = 100) -> transformers.BigBirdTokenizer:
    """BigBird's kind of tokenizer, for a few words."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    words = ["\u2581the", "\u2581a", "\u2581quick", "\u2581brown", "\u2581fox", "\u2581dog"]
    vocab = [(piece, 0.0) for piece in pieces] + [(word, -1.0) for word in words]
    return transformers.BigBirdTokenizer(vocab=vocab, model_max_length=max_length)


def tiny_pieces(max_length: int = 100) -> transformers.ReformerTokenizer:
    """Reformer's kind of tokenizer: letters and two merges."""
    words = ["</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581t", "\u2581th"]
    return transformers.ReformerTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("\u2581", "t"), ("\u2581t", "h")],
        model_max_length=max_length,
    )


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """The text of every warning a user would see meanwhile: Python's, and of any logger from WARNING up."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.name}: {record.getMessage()}")

    collector = Collector(logging.WARNING)
    # The library's logger does not propagate, so the root logger does not see it; and what it said once before it would
    # not say again.
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    levels = [logger.level for logger in loggers]
    transformers.utils.logging.warning_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for category in _HIDDEN:
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.addHandler(collector)
            logger.setLevel(logging.WARNING)
        try:
            yield found
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(collector)
                logger.setLevel(level)
            found.extend(f"{w.category.__name__}: {w.message}" for w in caught)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Fails if anything warns meanwhile, see `collect_warnings`."""
    with collect_warnings() as found:
        yield
    assert not found, "expected silence, got:\n" + "\n".join(found)
