"""Batches for masked language models and replaced-token detection."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .words import begins_word


IGNORED = -100  # the label of a token that is not predicted, as the losses know it

_PADDED_BY_TOKENIZER = ("input_ids", "attention_mask", "token_type_ids")
_NO_EPOCH = -1


class DataCollatorForReplacedTokenDetection:
    """Pads a batch and masks tokens of it anew in every epoch, for the generator of ELECTRA or any masked LM.

    Of an example's n maskable tokens `round(mlm_probability * n)` are chosen, at least one, uniformly and without
    replacement. (The released ELECTRA draws with replacement, so a little fewer.) Never chosen are padding, special
    tokens of the tokenizer wherever they come from, `[MASK]` and `[UNK]` in the text included, since an unknown token
    tells nothing, and what `special_tokens_mask` marks. An example without maskable tokens is left as it is.

    What is chosen is a function of `seed`, the epoch and the example's own tokens alone, not of the batch, the padding,
    the rank or the worker: a resumed run and a run on more processes choose the same, and equal examples of one epoch
    get equal masks. That needs `set_epoch` at the beginning of every epoch; it reaches the workers of a DataLoader,
    persistent ones too. Without an epoch each batch takes a number from torch's global generator instead: other masks
    every time, and after a resume others than in the undisturbed run.

    Args:
        tokenizer: one with a mask token; it also tells how and on which side to pad.
        mlm_probability: share of the maskable tokens that are chosen.
        whole_word: choose words instead of tokens. Words are gone through in random order and taken where they still
            fit into the number of tokens above; where none fits, the first one is taken. So no word is split, and long
            words come less often, in short texts above all. Special tokens separate words.
        mask_share: how likely a chosen token is shown as the mask token, each on its own; otherwise it is shown as it
            is, and predicted all the same. The paper has 1.0, the released ELECTRA 0.85.
        pad_to_multiple_of: pad to the next multiple of this length; None for the longest example.
        seed: any integer.
        epoch: the epoch to begin with, see `set_epoch`.

    A feature has `input_ids` (lists, arrays or tensors), and may have `attention_mask` and other columns with one
    integer a token, which are padded with 0 (`token_type_ids` as the tokenizer says). Two columns are used up:
    `special_tokens_mask`, and with `whole_word` `word_ids`: equal neighbours are one word, tokens with None or -1
    belong to no word and are not chosen. Without `word_ids` the vocabulary has to tell where words begin: WordPiece,
    byte-level BPE (where a word is what follows a blank, punctuation included) and SentencePiece do.

    Returns:
        The columns as int64 `[batch, length]`: `input_ids` with mask tokens, `attention_mask`, the others, and `labels`
        with the original ids where a token was chosen and -100 elsewhere.

    Raises:
        ValueError: options out of range, or a tokenizer without mask token; for a batch: no features, one without
            tokens or with `labels`, columns that only some have or that do not fit `input_ids`, different lengths
            without a pad token, words that nothing tells.

    Source: Clark, Luong, Le & Manning 2020, "ELECTRA", https://arxiv.org/abs/2003.10555; whole words as in the BERT
    authors' models of May 2019.

    Example:

    ```python
    >>> collator = DataCollatorForReplacedTokenDetection(tokenizer, whole_word=True, epoch=0)
    >>> batch = collator([tokenizer("a text"), tokenizer("another one")])
    >>> original = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])
    >>> collator.set_epoch(1)  # other masks from here on
    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        whole_word: bool = False,
        mask_share: float = 1.0,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
        epoch: int | None = None,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"this {type(tokenizer).__name__} has mask_token = None, and masking needs one; call "
                'tokenizer.add_special_tokens({"mask_token": "[MASK]"}) and '
                "model.resize_token_embeddings(len(tokenizer))."
            )
        if not 0 < mlm_probability < 1:
            raise ValueError(f"mlm_probability = {mlm_probability!r}: give a number above 0 and below 1, such as 0.15.")
        if not 0 <= mask_share <= 1:
            raise ValueError(f"mask_share = {mask_share!r}: give a number from 0 to 1.")
        if pad_to_multiple_of is not None and (not _is_integer(pad_to_multiple_of) or pad_to_multiple_of < 1):
            raise ValueError(f"pad_to_multiple_of = {pad_to_multiple_of!r}: give an integer, 1 or more, or None.")
        if not _is_integer(seed):
            raise ValueError(f"seed = {seed!r}: give an integer.")
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.whole_word = whole_word
        self.mask_share = mask_share
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = int(seed)
        self._begins_word: tuple[int, np.ndarray] | None = None
        # In shared memory, because persistent workers hold copies of the collator made before `set_epoch`.
        self._epoch = torch.tensor(_NO_EPOCH).share_memory_()
        self.set_epoch(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # plain pickle makes ordinary memory of it

    @property
    def epoch(self) -> int | None:
        """The epoch that `set_epoch` told, or None."""
        epoch = int(self._epoch)
        return None if epoch == _NO_EPOCH else epoch

    def set_epoch(self, epoch: int | None) -> None:
        """Say which epoch the next batches belong to, or None for masks from torch's global generator.

        Raises:
            ValueError: an `epoch` that is neither an integer from 0 on nor None.
        """
        if epoch is not None and (not _is_integer(epoch) or epoch < 0):
            raise ValueError(f"epoch = {epoch!r}: give an integer, 0 or more, or None.")
        self._epoch.fill_(_NO_EPOCH if epoch is None else int(epoch))

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate `features` into tensors."""
        columns = self._columns(features)
        batch = self._padded(columns)
        ids, valid = batch["input_ids"], batch["attention_mask"] != 0
        maskable = valid & (batch.pop("special_tokens_mask") == 0)
        begins = self._word_beginnings(ids, batch.pop("word_ids", None), maskable) if self.whole_word else None
        batch.pop("word_ids", None)

        epoch = self.epoch
        # A word of its own for each case, so that no epoch meets a drawn number.
        when = f"epoch {epoch}" if epoch is not None else f"drawn {int(torch.randint(2**63 - 1, ()))}"
        labels = np.full_like(ids, IGNORED)
        shown = ids.copy()
        for row in range(len(ids)):
            positions = np.flatnonzero(maskable[row])
            if not len(positions):
                continue
            draws = self._draws(ids[row, valid[row]], when, len(positions))
            count = max(1, round(self.mlm_probability * len(positions)))
            if begins is None:
                chosen = np.argsort(draws[0], kind="stable")[:count]
            else:
                chosen = _whole_words(begins[row, positions], draws[0], count)
            labels[row, positions[chosen]] = ids[row, positions[chosen]]
            # The upper 53 bits are a number below 1 without rounding.
            hidden = (draws[1, chosen] >> np.uint64(11)) * 2.0**-53 < self.mask_share
            shown[row, positions[chosen[hidden]]] = self.tokenizer.mask_token_id
        batch |= {"input_ids": shown, "labels": labels}
        return {name: torch.from_numpy(column) for name, column in batch.items()}

    def _draws(self, ids: np.ndarray, when: str, count: int) -> np.ndarray:
        """`[2, count]` uniform 64-bit numbers, a function of the arguments and the seed."""
        hashed = hashlib.blake2b(f"{self.seed} {when} ".encode(), digest_size=16)
        hashed.update(ids.astype("<i8").tobytes())
        # The raw stream is the same in every release of numpy; its distributions need not be.
        key = np.frombuffer(hashed.digest(), dtype="<u8").astype(np.uint64)
        return np.random.Philox(key=key).random_raw(2 * count).reshape(2, count)

    def _columns(self, features: list[Mapping[str, Any]]) -> dict[str, list[np.ndarray]]:
        """Column -> one int64 array an example, each as long as its `input_ids`."""
        if not len(features):
            raise ValueError("features = []: a batch needs at least one example.")
        names = dict.fromkeys(("input_ids", "attention_mask", "special_tokens_mask"))  # two are made where missing
        names |= dict.fromkeys(name for feature in features for name in feature)
        if "labels" in names:
            raise ValueError(
                "the features have labels, which the masked tokens would replace; drop that column, as in "
                'dataset.remove_columns("labels").'
            )
        columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for number, feature in enumerate(features):
            ids = feature.get("input_ids")
            if ids is None or np.ndim(ids) != 1 or len(ids) == 0:
                shape = None if ids is None else np.shape(ids)
                raise ValueError(
                    f"input_ids of feature {number} has shape {shape}; give a list of one or more ids, and drop empty "
                    "texts from the data set."
                )
            given = {"attention_mask": [1] * len(ids), **feature}
            if "special_tokens_mask" not in given:
                given["special_tokens_mask"] = self.tokenizer.get_special_tokens_mask(
                    _integers(ids, "input_ids", number, len(ids)).tolist(), already_has_special_tokens=True
                )
            for name, values in columns.items():
                if name not in given:
                    raise ValueError(f"feature {number} has no {name} while others have one; give all or none.")
                values.append(_integers(given[name], name, number, len(ids)))
        special_ids = self.tokenizer.all_special_ids
        for ids, special in zip(columns["input_ids"], columns["special_tokens_mask"], strict=True):
            special |= np.isin(ids, special_ids)
        return columns

    def _padded(self, columns: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        """The columns as `[batch, length]`."""
        lengths = [len(ids) for ids in columns["input_ids"]]
        target = -(-max(lengths) // (self.pad_to_multiple_of or 1)) * (self.pad_to_multiple_of or 1)
        is_ragged = min(lengths) < target
        if is_ragged and self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"examples of {min(lengths)} to {max(lengths)} tokens are to be padded to {target}, but this "
                f"{type(self.tokenizer).__name__} has pad_token = None; set one "
                "(tokenizer.pad_token = tokenizer.eos_token, say) or cut all texts to one length."
            )
        batch = self.tokenizer.pad(
            {name: columns[name] for name in _PADDED_BY_TOKENIZER if name in columns},
            padding="longest" if is_ragged else False,  # without padding no pad token is asked for
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors="np",
        )
        padded = {name: np.asarray(column, dtype=np.int64) for name, column in batch.items()}
        is_left = self.tokenizer.padding_side == "left"
        for name in columns.keys() - padded.keys():
            padded[name] = np.zeros((len(lengths), target), dtype=np.int64)
            for row, values in enumerate(columns[name]):
                start = target - len(values) if is_left else 0
                padded[name][row, start : start + len(values)] = values
        return padded

    def _word_beginnings(self, ids: np.ndarray, word_ids: np.ndarray | None, maskable: np.ndarray) -> np.ndarray:
        """Bool `[batch, length]`, whether a maskable token begins a word; with `word_ids`, narrows `maskable` too."""
        if word_ids is not None:
            maskable &= word_ids >= 0
            begins = np.diff(word_ids, axis=1, prepend=-1) != 0
        else:
            # Tokens may be added to a tokenizer later on.
            if self._begins_word is None or self._begins_word[0] != len(self.tokenizer):
                self._begins_word = len(self.tokenizer), begins_word(self.tokenizer)
            table = self._begins_word[1]
            if ids.min() < 0 or ids.max() >= len(table):
                raise ValueError(
                    f"input_ids reach from {ids.min()} to {ids.max()}, but the tokenizer's ids from 0 to "
                    f"{len(table) - 1}; give the tokenizer that made them."
                )
            begins = table[ids]
        begins[:, 1:] |= ~maskable[:, :-1]  # what is not maskable separates words
        return begins


def _whole_words(begins: np.ndarray, draws: np.ndarray, count: int) -> np.ndarray:
    """Places of the tokens to choose among the maskable ones: whole words of `count` tokens in all, if they fit."""
    starts = np.flatnonzero(begins | (np.arange(len(begins)) == 0))
    sizes = np.diff(starts, append=len(begins))
    order = np.argsort(draws[starts], kind="stable")
    taken, left = [], count
    for word, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= left:
            taken.append(word)
            left -= size
            if not left:
                break
    words = taken or order[:1].tolist()
    return np.concatenate([np.arange(starts[word], starts[word] + sizes[word]) for word in words])


def _integers(values: Any, name: str, number: int, length: int) -> np.ndarray:
    """`values` of feature `number` as a fresh int64 array of `length`."""
    if name == "word_ids" and not isinstance(values, Tensor | np.ndarray):
        values = [-1 if value is None else value for value in values]
    array = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (length,) or array.dtype.kind not in "biu":
        raise ValueError(
            f"{name} of feature {number} has shape {array.shape} and dtype {array.dtype} for {length} input_ids; give "
            "one integer a token, or drop the column."
        )
    return array.astype(np.int64)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
