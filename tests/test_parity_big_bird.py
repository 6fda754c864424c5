"""EffBigBird against transformers' own BigBird: equal weights and random blocks, equal results without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import TINY, collect_warnings, mask_of, model_class, no_warnings, random_ids, randomise_
from torch import Tensor
from torch.testing import assert_close
from transformers import BigBirdConfig
from transformers.models.big_bird import modeling_big_bird

from hf_efficient_attn.attention.big_bird import BigBirdSelfAttention


CLOSE = {"atol": 2e-5, "rtol": 2e-5}
SEP = 4
HEADS = {
    "BigBirdModel": "AutoModel",
    "BigBirdForPreTraining": "AutoModelForPreTraining",
    "BigBirdForMaskedLM": "AutoModelForMaskedLM",
    "BigBirdForSequenceClassification": "AutoModelForSequenceClassification",
    "BigBirdForTokenClassification": "AutoModelForTokenClassification",
    "BigBirdForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BigBirdForMultipleChoice": "AutoModelForMultipleChoice",
}
EVERY_HEAD = pytest.mark.parametrize("name", HEADS)


def pair(name: str, folder: Path, backend: str = "sdpa", **overrides: Any) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours loaded from what it saved."""
    labels = {} if "Question" in name else {"num_labels": 3}
    fields = {**TINY, **labels, "block_size": 4, "num_random_blocks": 2, "sep_token_id": SEP, **overrides}
    original = randomise_(getattr(transformers, name)(BigBirdConfig(**fields)))
    original.save_pretrained(folder)
    return original, model_class("eff_big_bird", HEADS[name]).from_pretrained(folder, attn_implementation=backend)


def inputs_for(name: str, lengths: list[int]) -> dict[str, Tensor]:
    """Right-padded examples with one separator each; three choices for multiple choice."""
    length = max(lengths)
    mask = mask_of(lengths, length)
    ids = random_ids(len(lengths), length)
    for row in range(len(lengths)):
        ids[row, [2 + row % 3, lengths[row] - 1]] = SEP
    inputs = {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}
    if name == "BigBirdForMultipleChoice":
        inputs = {key: torch.stack([x, x.roll(1, 0), x.roll(2, 0)], dim=1) for key, x in inputs.items()}
    return inputs


def labels_for(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if name in ("BigBirdForMaskedLM", "BigBirdForPreTraining", "BigBirdForTokenClassification"):
        labels = {"labels": (ids % (3 if "Token" in name else 64)).masked_fill(mask == 0, -100)}
        return {**labels, "next_sentence_label": ids[:, 0] % 2} if "PreTraining" in name else labels
    if name == "BigBirdForQuestionAnswering":
        return {"start_positions": torch.full((ids.shape[0],), 6), "end_positions": torch.full((ids.shape[0],), 9)}
    return {} if name == "BigBirdModel" else {"labels": torch.arange(ids.shape[0]) % 3}


def assert_same(ours: Any, original: Any, mask: Tensor) -> None:
    """Every output is equal, at valid tokens where it has a row a token."""
    names = [key for key, x in ours.items() if isinstance(x, Tensor)]
    assert names and set(names) <= set(original.keys())
    for key in names:
        mine, theirs = ours[key], original[key]
        assert mine.shape == theirs.shape
        by_token = mine.dim() >= 2 and mine.shape[: mask.dim()] == mask.shape
        keep = mask.bool() if by_token else ...
        assert_close(mine[keep], theirs[keep], **CLOSE)


def share_random_blocks(monkeypatch: pytest.MonkeyPatch, ours: Any) -> list[Tensor]:
    """Have our layers attend the random blocks that transformers' layers drew in their last pass."""
    drawn: list[Tensor] = []
    make_mask = modeling_big_bird.BigBirdBlockSparseAttention._create_rand_mask_from_inputs

    def recorded(from_mask: Tensor, to_mask: Tensor, blocks: Tensor, *args: Any) -> Tensor:
        drawn.append(blocks[:1])
        return make_mask(from_mask, to_mask, blocks, *args)

    monkeypatch.setattr(
        modeling_big_bird.BigBirdBlockSparseAttention, "_create_rand_mask_from_inputs", staticmethod(recorded)
    )
    # Each layer is asked, and not the first one for all.
    monkeypatch.setattr(BigBirdSelfAttention, "are_alike", staticmethod(lambda layers: False))
    count = len(ours.base_model.encoder.layer)
    for number, layer in enumerate(ours.base_model.encoder.layer):

        def blocks_of(text_blocks: Tensor, rows: int, layers: int, number: int = number) -> Tensor:
            # transformers lists the rows between the first and the last one.
            return torch.nn.functional.pad(drawn[-count:][number], (0, 0, 1, 1), value=-1)

        monkeypatch.setattr(layer.attention.self, "random_blocks", blocks_of)
    return drawn


@EVERY_HEAD
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_full_attention_is_equal(name: str, backend: str, tmp_path: Path) -> None:
    """With padding, loss and gradients."""
    original, ours = pair(name, tmp_path, backend, attention_type="original_full")
    # The original lets padding compete for the answer, which moves its loss.
    inputs = inputs_for(name, [23, 23, 23] if "Question" in name else [23, 14, 19])
    inputs.update(labels_for(name, inputs))
    theirs, mine = original(**inputs), ours(**inputs)
    assert_same(mine, theirs, inputs["attention_mask"])
    if "loss" not in mine:
        return
    theirs.loss.backward()
    mine.loss.backward()
    found = {key: x.grad for key, x in original.named_parameters() if x.grad is not None}
    for key, parameter in ours.named_parameters():
        assert_close(parameter.grad, found.pop(key), **CLOSE, msg=lambda m: f"{key}: {m}")  # noqa: B023
    assert not found


def test_answers_among_padded_texts_are_equal(tmp_path: Path) -> None:
    name = "BigBirdForQuestionAnswering"
    original, ours = pair(name, tmp_path, attention_type="original_full")
    inputs = inputs_for(name, [23, 14, 19])
    inputs["input_ids"][1] = inputs["input_ids"][1].masked_fill(inputs["input_ids"][1] == SEP, 9)  # no question
    with torch.no_grad():
        assert_same(ours(**inputs), original(**inputs), inputs["attention_mask"])


@EVERY_HEAD
@pytest.mark.parametrize("train", [False, True])
def test_blocks_are_equal(name: str, train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training its blocks are random, in evaluation all of them are block 0, which then counts several times."""
    original, ours = pair(name, tmp_path)
    drawn = share_random_blocks(monkeypatch, ours)
    inputs = inputs_for(name, [60, 60])
    inputs.update(labels_for(name, inputs))
    theirs, mine = original.train(train)(**inputs), ours.train(train)(**inputs)
    assert len(drawn) == 2 and (drawn[0].max() > 0) == train
    assert_same(mine, theirs, inputs["attention_mask"])
    if "loss" in mine:
        theirs.loss.backward()
        mine.loss.backward()
        for key, parameter in ours.named_parameters():
            assert_close(parameter.grad, original.get_parameter(key).grad, **CLOSE, msg=lambda m: f"{key}: {m}")  # noqa: B023


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("length", "size", "count"),
    [(37, 4, 2), (48, 4, 2), (59, 4, 2), (64, 4, 3), (100, 5, 3), (128, 8, 1), (1024, 64, 3), (1000, 64, 3)],
)
def test_any_length_with_its_random_blocks(
    length: int, size: int, count: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its plan for 1,024 tokens names the last block, which is global, once more."""
    overrides = {"block_size": size, "num_random_blocks": count, "max_position_embeddings": 4096}
    original, ours = pair("BigBirdModel", tmp_path, backend, **overrides)
    share_random_blocks(monkeypatch, ours)
    ids = random_ids(2, length)
    with torch.no_grad():
        theirs = original.train()(ids, output_hidden_states=True)
        mine = ours.train()(ids, output_hidden_states=True)
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b[:, :length], **CLOSE)  # theirs are filled up to whole blocks


def test_without_biases_and_with_rescaled_embeddings(tmp_path: Path) -> None:
    original, ours = pair(
        "BigBirdModel", tmp_path, use_bias=False, rescale_embeddings=True, attention_type="original_full"
    )
    assert ours.encoder.layer[0].attention.self.query.bias is None
    ids = random_ids(2, 20)
    with torch.no_grad():
        assert_same(ours(ids), original(ids), torch.ones_like(ids))
        embedded = original.embeddings.word_embeddings(ids)
        assert_same(ours(inputs_embeds=embedded), original(ids), torch.ones_like(ids))


@EVERY_HEAD
def test_its_folders_load_without_a_warning(name: str, tmp_path: Path) -> None:
    with no_warnings():
        _, ours = pair(name, tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    with no_warnings():
        again = model_class("eff_big_bird", HEADS[name]).from_pretrained(tmp_path / "ours")
    assert again.config.model_type == "eff_big_bird"
    for (key, a), b in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_language_model_saved_as_causal(tmp_path: Path) -> None:
    """transformers' causal class is an encoder by default; as a decoder it has full attention, which ours has not."""
    fields = {**TINY, "attention_type": "original_full", "sep_token_id": SEP}
    original = randomise_(transformers.BigBirdForCausalLM(BigBirdConfig(**fields)))
    original.save_pretrained(tmp_path)
    cls = model_class("eff_big_bird", "AutoModelForMaskedLM")
    with no_warnings():
        ours = cls.from_pretrained(tmp_path)
    ids = random_ids(2, 20)
    with torch.no_grad():
        assert_close(ours(ids).logits, original(ids).logits, **CLOSE)
    original.config.is_decoder = True
    original.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_decoder = True.*no causal form"):
        cls.from_pretrained(tmp_path)


def test_it_differs_where_the_original_is_wrong(tmp_path: Path) -> None:
    """What ours does not do: stay dense after a short input, move with padding, draw block 0 in evaluation."""
    original, ours = pair("BigBirdModel", tmp_path)
    long, short = random_ids(1, 60), random_ids(1, 9)
    padded = torch.nn.functional.pad(long, (0, 20))
    mask = (torch.arange(80) < 60)[None].long()
    with torch.no_grad(), collect_warnings() as warned:
        first = ours(long)[0]
        assert_close(ours(padded, mask)[0][:, :60], first, **CLOSE)
        assert (original(padded, mask)[0][:, :60] - original(long)[0]).abs().max() > 1e-3
        before = original(long)[0]
        ours(short), original(short)
        assert_close(ours(long)[0], first)
        assert (original(long)[0] - before).abs().max() > 1e-3
    assert all("big_bird" in line for line in warned), "ours says nothing"
    blocks = ours.encoder.layer[0].attention.self.random_blocks(torch.tensor([15]), 15)
    assert (blocks[0, :, 1:-1] > 0).all()
