"""EffReformer against transformers' own: equal weights and hash directions, equal results.

Compared in float64. In float32 transformers' -1e5 for a token with itself leaves its log-sum-exp a hundredth to be
exact to, which shows with a causal mask and several rounds, where the first tokens have nothing but themselves.

Where transformers goes by the padded length, ours goes by the text: the last chunk, which is also the one before the
first, and without `num_buckets` the bucket count. So padding here ends within the last chunk, or no chunk looks back.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import collect_warnings, mask_of, model_class, no_warnings, random_ids, randomise_
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, BertConfig, BertModel, ReformerConfig, ReformerModel

from hf_efficient_attn import EffReformerConfig, EffReformerModel
from hf_efficient_attn.attention import lsh


FAMILY = "eff_reformer"
SEED = 3
LENGTH = 96  # a multiple of both chunk lengths
EXACT = {"atol": 1e-9, "rtol": 1e-9}
# Losses are computed in float32, whatever the model's dtype.
LOSS = {"atol": 1e-6, "rtol": 1e-5}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "attention_head_size": 8,
    "num_attention_heads": 4,
    "feed_forward_size": 48,
    "axial_pos_shape": [8, 16],
    "axial_pos_embds_dim": [8, 24],
    "max_position_embeddings": 128,
    "lsh_attn_chunk_length": 16,
    "local_attn_chunk_length": 8,
    "attn_layers": ["local", "lsh", "lsh"],
    "num_hashes": 2,
    "num_buckets": 4,
    "hash_seed": SEED,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.dtype]:
    """What transformers draws at each call with a `hash_seed`, in all layers the same; in the model's dtype."""
    drawn = {"dtype": torch.float64}

    def draw(seed: int, layer: int, redraw: int, **shape: Any) -> Tensor:
        sizes = [shape[name] for name in ("heads", "head_dim", "rounds", "directions")]
        return torch.randn(sizes, generator=torch.Generator().manual_seed(SEED), **drawn)

    monkeypatch.setattr(lsh, "hash_rotations", draw)
    return drawn


@dataclass(frozen=True)
class Head:
    """One task: its Auto class, transformers' class, its outputs and what its config needs."""

    auto: str
    original: str
    outputs: tuple[str, ...] = ("logits",)
    config: dict[str, Any] = field(default_factory=dict)

    def labels(self, ids: Tensor) -> dict[str, Tensor]:
        """Labels for a batch of three."""
        if self.auto in ("AutoModelForMaskedLM", "AutoModelForCausalLM"):
            return {"labels": (ids * 7 % 64).masked_fill(ids % 5 == 0, -100)}
        if self.auto == "AutoModelForQuestionAnswering":
            return {"start_positions": torch.tensor([3, 999, 1]), "end_positions": torch.tensor([5, 8, 2])}
        return {"labels": torch.tensor([2, 0, 1])}


HEADS = {
    head.original: head
    for head in (
        Head("AutoModel", "ReformerModel", ("last_hidden_state",)),
        Head("AutoModelForCausalLM", "ReformerModelWithLMHead", config={"is_decoder": True}),
        Head("AutoModelForMaskedLM", "ReformerForMaskedLM"),
        Head("AutoModelForSequenceClassification", "ReformerForSequenceClassification", config={"num_labels": 3}),
        Head("AutoModelForQuestionAnswering", "ReformerForQuestionAnswering", ("start_logits", "end_logits")),
    )
}
BASE, CAUSAL = HEADS["ReformerModel"], HEADS["ReformerModelWithLMHead"]
EVERY_HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=lambda head: head.original)


def make_original(head: Head, **overrides: Any) -> Any:
    model = randomise_(getattr(transformers, head.original)(ReformerConfig(**{**TINY, **head.config, **overrides})))
    if hasattr(model, "lm_head"):
        # transformers does not add it any more; released checkpoints were trained with it.
        torch.nn.init.zeros_(model.lm_head.bias)
    return model


def pair(head: Head, folder: Path, *, backend: str = "sdpa", dtype: Any = torch.float64, **overrides: Any) -> tuple:
    """transformers' model with random weights, and ours loaded from what it saved."""
    original = make_original(head, **overrides)
    original.save_pretrained(folder)
    ours = model_class(FAMILY, head.auto).from_pretrained(folder, attn_implementation=backend)
    return original.to(dtype), ours.to(dtype)


def assert_same(head: Head, ours: Any, original: Any, close: dict[str, float] = EXACT, keep: Any = ...) -> None:
    for name in head.outputs:
        assert_close(ours[name][keep], original[name][keep], **close)


@EVERY_HEAD
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_outputs_are_equal(head: Head, backend: str, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, backend=backend)
    ids = random_ids(3, LENGTH)
    theirs, mine = (model(ids, output_hidden_states=True) for model in (original, ours))
    assert_same(head, mine, theirs)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 4
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b, **EXACT)


@EVERY_HEAD
@torch.no_grad()
def test_outputs_are_equal_in_float32(head: Head, drawn: dict[str, torch.dtype], tmp_path: Path) -> None:
    """As users load them, with one round."""
    drawn["dtype"] = torch.float32
    original, ours = pair(head, tmp_path, dtype=torch.float32, num_hashes=1)
    ids = random_ids(3, LENGTH)
    assert_same(head, ours(ids), original(ids), {"atol": 1e-4, "rtol": 1e-4})


# What the config says besides.
OPTIONS: dict[str, dict[str, Any]] = {
    "chosen buckets": {"num_buckets": None},
    "two factors": {"num_buckets": [2, 4]},
    "three factors": {"num_buckets": [2, 4, 6]},
    "no power of two": {"num_buckets": 6},
    "further back": {"lsh_num_chunks_before": 2, "local_num_chunks_before": 3},
    "nothing back": {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0},
    "learned positions": {"axial_pos_embds": False},
    "wide heads": {"attention_head_size": 12},
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    "chunked feed-forward": {"chunk_size_feed_forward": 16, "chunk_size_lm_head": 24},
    "equal chunks": {"local_attn_chunk_length": 16},
}
AFTER = {"lsh_num_chunks_after": 1, "local_num_chunks_after": 2}


@pytest.mark.parametrize("layers", [["lsh"], ["local"], ["local", "lsh", "lsh"]], ids="-".join)
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("head", [BASE, CAUSAL], ids=["encoder", "causal"])
@torch.no_grad()
def test_layers_and_rounds(head: Head, rounds: int, layers: list[str], tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, attn_layers=layers, num_hashes=rounds)
    ids = random_ids(2, LENGTH)
    assert_same(head, ours(ids), original(ids))


@pytest.mark.parametrize(("layers", "depth"), [(["local"], 3), (["local", "lsh", "local"], 2)], ids=["more", "fewer"])
@torch.no_grad()
def test_a_depth_of_its_own(layers: list[str], depth: int, tmp_path: Path) -> None:
    """transformers lets the number of layers win over the list of kinds."""
    original, ours = pair(BASE, tmp_path, attn_layers=layers, num_hidden_layers=depth)
    assert len(original.encoder.layers) == len(ours.encoder.layers) == depth
    ids = random_ids(2, LENGTH)
    assert_same(BASE, ours(ids), original(ids))


@pytest.mark.parametrize("name", [*OPTIONS, "ahead"])
@pytest.mark.parametrize("head", [BASE, CAUSAL], ids=["encoder", "causal"])
@torch.no_grad()
def test_options(head: Head, name: str, tmp_path: Path) -> None:
    if name == "ahead" and head is CAUSAL:
        pytest.skip("transformers refuses it")
    original, ours = pair(head, tmp_path, **(AFTER if name == "ahead" else OPTIONS[name]))
    ids = random_ids(2, LENGTH)
    # A cache hashes with room for the longest text.
    assert_same(head, ours(ids, use_cache=False), original(ids))


@torch.no_grad()
def test_chosen_factors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """128 buckets as 8 times 16, for which ours has room beside those of the longest text."""
    room = torch.cat([torch.arange(4), 8 + torch.arange(8)])

    def draw(*numbers: int, directions: int, device: torch.device, **sizes: int) -> Tensor:
        assert directions == 16
        theirs = torch.randn(4, 8, 2, 12, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        return torch.zeros(4, 8, 2, 16, dtype=torch.float64).index_copy(3, room, theirs)

    monkeypatch.setattr(lsh, "hash_rotations", draw)
    original, ours = pair(BASE, tmp_path, num_buckets=None, lsh_attn_chunk_length=1, local_attn_chunk_length=1)
    ids = random_ids(2, LENGTH)
    assert_same(BASE, ours(ids), original(ids))
    assert original.config.num_buckets == [8, 16] and ours.config.num_buckets is None


@pytest.mark.parametrize("length", [1, 5, 16, 17, 33, 100, 128])
@pytest.mark.parametrize("head", [BASE, CAUSAL], ids=["encoder", "causal"])
@torch.no_grad()
def test_any_length_with_equal_chunks(head: Head, length: int, tmp_path: Path) -> None:
    """Then transformers pads no more than the last chunk."""
    original, ours = pair(head, tmp_path, local_attn_chunk_length=16)
    ids = random_ids(2, length)
    assert_same(head, ours(ids), original(ids))


@pytest.mark.parametrize(
    ("lengths", "overrides"),
    [
        ([96, 90, 89], {}),
        ([96, 90, 89], {"num_buckets": None}),
        ([96, 50, 17], {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0}),
    ],
)
@pytest.mark.parametrize("head", [BASE, CAUSAL, HEADS["ReformerForSequenceClassification"]], ids=lambda x: x.original)
@torch.no_grad()
def test_padding_on_the_right(head: Head, lengths: list[int], overrides: dict[str, Any], tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, **overrides)
    ids, mask = random_ids(3, LENGTH), mask_of(lengths, LENGTH)
    keep = mask.bool() if "Classification" not in head.original else ...
    extra = {"use_cache": False} if head is CAUSAL else {}
    assert_same(head, ours(ids, attention_mask=mask, **extra), original(ids, attention_mask=mask), keep=keep)


@EVERY_HEAD
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("reversible", [True, False])
def test_losses_and_gradients_are_equal(head: Head, backend: str, reversible: bool, tmp_path: Path) -> None:
    """At the one length that transformers trains with, the number of places of the axes."""
    original, ours = pair(head, tmp_path, backend=backend)
    ours.base_model.encoder.reversible = reversible
    original.train(), ours.train()
    ids = random_ids(3, 128)
    labels = {} if head is BASE else head.labels(ids)
    outputs = [model(ids, **labels) for model in (original, ours)]
    losses = [x.last_hidden_state.square().mean() + x[0].sin().mean() if head is BASE else x.loss for x in outputs]
    close = EXACT if head is BASE else LOSS
    assert_close(losses[1], losses[0], check_dtype=False, **close)
    for loss in losses:
        loss.backward()
    theirs, mine = (dict(model.named_parameters()) for model in (original, ours))
    assert theirs.keys() == mine.keys()
    for name, parameter in mine.items():
        if name == "lm_head.bias":
            assert theirs[name].grad is None and parameter.grad.abs().max() > 0
            continue
        assert_close(parameter.grad, theirs[name].grad, **close, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_greedy_search_gives_the_same_texts(tmp_path: Path) -> None:
    """Without transformers' cache, which hashes with other chunks; with ours where only the last layer sorts."""
    original, ours = pair(CAUSAL, tmp_path, attn_layers=["local", "lsh"], local_attn_chunk_length=16)
    ids = random_ids(2, 20)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    theirs = original.generate(ids, use_cache=False, **options)
    for use_cache in (True, False):
        assert torch.equal(ours.generate(ids, use_cache=use_cache, **options), theirs)


@EVERY_HEAD
def test_loading_is_silent_and_complete(head: Head, tmp_path: Path) -> None:
    original = make_original(head)
    original.save_pretrained(tmp_path)
    with no_warnings():
        ours, info = model_class(FAMILY, head.auto).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    # A parameter that transformers trains, ours trains; and the other way round.
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in original.named_parameters()]


def test_what_old_checkpoints_hold_besides(tmp_path: Path) -> None:
    """Masks that were buffers in the state, and the head's bias under two names."""
    original = make_original(CAUSAL)
    original.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        for name in ("self_mask_value_float16", "self_mask_value_float32", "mask_value_float16", "mask_value_float32"):
            state[f"reformer.encoder.layers.{layer}.attention.self_attention.{name}"] = torch.tensor(-1e3)
    state["lm_head.decoder.bias"] = state["lm_head.bias"].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        with no_warnings():
            ours, info = model_class(FAMILY, auto).from_pretrained(
                tmp_path, is_decoder="Causal" in auto, output_loading_info=True
            )
        assert not any(info.values()), info
        for name, tensor in ours.state_dict().items():
            assert torch.equal(state[name], tensor), name


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    """transformers loses the head's bias then, which ours says and starts from 0."""
    original = make_original(CAUSAL)
    original.resize_token_embeddings(70)
    original.save_pretrained(tmp_path)
    ours, info = model_class(FAMILY, CAUSAL.auto).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.bias"}
    assert ours.lm_head.bias.shape == (70,) and (ours.lm_head.bias == 0).all()
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        assert_same(CAUSAL, ours.double()(ids), original.double()(ids))


def test_other_heads_and_types_still_warn(tmp_path: Path) -> None:
    make_original(BASE).save_pretrained(tmp_path / "base")
    with collect_warnings() as found:
        model_class(FAMILY, "AutoModelForTokenClassification").from_pretrained(tmp_path / "base")
    assert any("classifier" in text for text in found), found
    BertModel(BertConfig(num_hidden_layers=1, hidden_size=12, vocab_size=9)).save_pretrained(tmp_path / "bert")
    with collect_warnings() as found, pytest.raises(Exception, match=r"."):
        model_class(FAMILY, "AutoModel").from_pretrained(tmp_path / "bert")
    assert any("type `bert`" in text or "type bert" in text for text in found), found


@EVERY_HEAD
@torch.no_grad()
def test_saved_as_our_own_type(head: Head, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path / "original")
    ours.save_pretrained(tmp_path / "ours")
    with no_warnings():
        again, info = getattr(transformers, head.auto).from_pretrained(
            tmp_path / "ours", dtype=torch.float64, output_loading_info=True
        )
    assert not any(info.values()), info
    assert type(again) is type(ours) and again.config.model_type == FAMILY
    # One name for each thing.
    saved = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert "feed_forward_size" not in saved and saved["intermediate_size"] == 48
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == original.state_dict().keys()
    ids = random_ids(2, LENGTH)
    assert_same(head, again(ids), original(ids))


# Fields of a published config -> those of ours.
CONVERSIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "feed-forward": ({"feed_forward_size": 77}, {"intermediate_size": 77, "feed_forward_size": 77}),
    "layers": (
        {"attn_layers": ["lsh", "local", "local"]},
        {"attn_layers": ["lsh", "local", "local"], "num_hidden_layers": 3},
    ),
    "heads": ({"attention_head_size": 20, "num_attention_heads": 3}, {"attention_head_size": 20}),
    "no seed": ({"hash_seed": None}, {"hash_seed": 0}),
    "seed": ({"hash_seed": 5}, {"hash_seed": 5}),
    "tuples": (
        {"axial_pos_shape": (4, 8), "axial_pos_embds_dim": (100, 156)},
        {"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [100, 156], "max_position_embeddings": 32},
    ),
    "large grid": ({"axial_pos_shape": [512, 1024]}, {"max_position_embeddings": 4096}),
    "no grid": ({"axial_pos_embds": False, "max_position_embeddings": 9000}, {"max_position_embeddings": 9000}),
    "buckets": ({"num_buckets": [4, 8]}, {"num_buckets": [4, 8]}),
    "dropout": ({"lsh_attention_probs_dropout_prob": 0.3}, {"lsh_attention_probs_dropout_prob": 0.3}),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_published_configs(name: str, tmp_path: Path) -> None:
    given, expected = CONVERSIONS[name]
    ReformerConfig(**given).save_pretrained(tmp_path)
    with no_warnings():
        config = EffReformerConfig.from_pretrained(tmp_path)
    assert {field: getattr(config, field) for field in expected} == expected
    config.save_pretrained(tmp_path)
    with no_warnings():
        again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


@pytest.mark.parametrize("how", ["saved", "every field", "type only"])
def test_published_defaults(how: str, tmp_path: Path) -> None:
    theirs = ReformerConfig()
    theirs.save_pretrained(tmp_path)
    if how != "saved":
        fields = theirs.to_dict() if how == "every field" else {"model_type": "reformer"}
        (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with no_warnings():
        ours = EffReformerConfig.from_pretrained(tmp_path)
    different = {"model_type", "hash_seed", "transformers_version"}
    lists = {name: list(getattr(theirs, name)) for name in ("attn_layers", "axial_pos_shape", "axial_pos_embds_dim")}
    for name, value in {**theirs.to_dict(), **lists}.items():
        assert name in different or getattr(ours, name) == value, name
    with torch.device("meta"):
        a, b = EffReformerModel(ours).state_dict(), ReformerModel(theirs).state_dict()
    assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
