"""`exact_below`: softmax attention for short examples; the table of mechanisms has it as variants of its own."""

import pytest
import torch
from helpers import mask_of, tiny_config
from inside_cases import MODELS
from oracles import softmax
from torch import Tensor

from hf_efficient_attn import EffPerformerConfig, EffReformerConfig, use_efficient_attention
from hf_efficient_attn.attention.lsh import LSHOptions, LSHSelfAttention
from hf_efficient_attn.attention.performer import PerformerOptions
from hf_efficient_attn.functional import hash_buckets, hash_rotations, hashed_attention
from hf_efficient_attn.functional.exact_rows import attend_others, attend_short_rows
from hf_efficient_attn.models.eff_performer import modeling_eff_performer
from hf_efficient_attn.models.eff_reformer import modeling_eff_reformer


def padded(lengths: list[int], left: bool = False) -> Tensor:
    return mask_of(lengths, max(lengths), "left" if left else "right").bool()


def qkv(batch: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, 2, length, 8, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_each_example_goes_by_its_own_tokens(left: bool) -> None:
    """Below the bound one function, from it on the other, whatever the length of the batch."""
    lengths = [10, 11, 12, 30]
    mask, tensors = padded(lengths, left), qkv(4, 30)
    found = attend_short_rows(
        lambda q, k, v, keep: q * keep[:, None, :, None],
        lambda q, k, v, keep: -q if keep is None else -q * keep[:, None, :, None],
        *tensors,
        mask,
        12,
    )
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:, None, None, None]
    assert torch.equal(found, tensors[0] * sign * mask[:, None, :, None])


def test_what_no_example_wants_is_not_computed() -> None:
    calls = []

    def run(lengths: list[int] | None, length: int) -> list[str]:
        calls.clear()
        estimate, exact = (lambda q, k, v, keep, x=x: calls.append(x) or q for x in ("estimate", "exact"))
        attend_short_rows(
            estimate, exact, *qkv(2, length), None if lengths is None else padded([*lengths, length])[:2], 12
        )
        return sorted(calls)

    assert run(None, 11) == ["exact"]
    assert run(None, 12) == ["estimate"]
    assert run([12, 20], 20) == ["estimate"]
    assert run([3, 11], 20) == ["exact"]
    assert run([3, 12], 20) == ["estimate", "exact"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_token_attends_itself_where_it_is_alone(dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    query, key, value = qkv(3, 3, dtype)
    mixed = attend_others(query, key, value, mask)
    assert torch.equal(mixed[0, :, 0], value[0, :, 0])
    assert torch.equal(mixed[1, :, :2], value[1, :, :2].flip(1))
    assert not mixed[0, :, 1:].any()
    assert not mixed[2].any()


def test_many_queries_are_the_same_in_pieces() -> None:
    query, key, value = qkv(1, 1100)
    expected = attend_others(query, key, value)
    scores = (query @ key.transpose(2, 3)) / 8**0.5
    right = scores.masked_fill(torch.eye(1100, dtype=torch.bool), -torch.inf).softmax(dim=-1) @ value
    torch.testing.assert_close(expected, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_hashed_attention_below_the_bound_is_softmax(left: bool) -> None:
    mask, tensors = padded([5, 19, 20, 40], left), qkv(4, 40)
    rotations = hash_rotations(0, 0, 0, heads=2, head_dim=8, rounds=2, directions=4, device=torch.device("cpu"))
    buckets = [hash_buckets(x, rotations, torch.tensor([[8]]), (8,)) for x in tensors[:2]]
    options = {"query_buckets": buckets[0], "key_buckets": buckets[1], "chunk_length": 4}
    options |= {"chunks_before": 1, "chunks_after": 1}
    found = hashed_attention(*tensors, mask, exact_below=20, **options)
    torch.testing.assert_close(found[:2], softmax(*tensors, mask)[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[2:], hashed_attention(*tensors, mask, **options)[2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("performer", {}), ("lsh", {"lsh_attn_chunk_length": 4})])
def test_inside_another_model_short_texts_are_the_models_own(name: str, options: dict) -> None:
    model, ids = MODELS["Bert"].build().eval(), torch.randint(5, 60, (2, 40))
    mask = padded([19, 40]).long()
    with torch.no_grad():
        right = model(input_ids=ids, attention_mask=mask)[0]
        model = use_efficient_attention(model, name, exact_below=20, **options)
        found = model(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(found[0, :19], right[0, :19], rtol=0, atol=1e-5)
    assert (found[1] - right[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["eff_performer", "eff_reformer"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_eager_backend_draws_the_same_line(family: str, side: str) -> None:
    """Examples one token short of the bound, at it, and beyond, in one batch."""
    config = tiny_config(family, exact_below=20)
    torch.manual_seed(0)
    cls = {
        "eff_performer": modeling_eff_performer.EffPerformerModel,
        "eff_reformer": modeling_eff_reformer.EffReformerModel,
    }
    model = cls[family](config).double().eval()
    mask, ids = mask_of([19, 20, 21], 21, side), torch.randint(5, 60, (3, 21))
    with torch.no_grad():
        sdpa = model(input_ids=ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation("eager")
        eager = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for length in (19, 20):
            alone = model(input_ids=ids[:1, :length]).last_hidden_state
            model.set_attn_implementation("sdpa")
            torch.testing.assert_close(alone, model(input_ids=ids[:1, :length]).last_hidden_state, rtol=0, atol=1e-10)
            model.set_attn_implementation("eager")
    torch.testing.assert_close(eager[mask.bool()], sdpa[mask.bool()], rtol=0, atol=1e-10)


def test_nothing_is_hashed_where_every_text_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = modeling_eff_reformer.EffReformerModel(tiny_config("eff_reformer", exact_below=20)).eval(), []
    hashed = LSHSelfAttention.buckets
    monkeypatch.setattr(LSHSelfAttention, "buckets", lambda *args: calls.append(1) or hashed(*args))
    with torch.no_grad():
        model(input_ids=torch.randint(5, 60, (2, 19)))
        assert not calls
        model(input_ids=torch.randint(5, 60, (2, 20)))
    assert calls


def test_reversible_layers_compute_the_same_gradients() -> None:
    config = tiny_config("eff_reformer", exact_below=20, hidden_dropout_prob=0.0, num_hashes=2)
    mask, ids = padded([7, 20, 33]).long(), torch.randint(5, 60, (3, 33))
    grads = []
    for reversible in (True, False):
        config.reversible = reversible
        torch.manual_seed(0)
        model = modeling_eff_reformer.EffReformerModel(config).double().train()
        model(input_ids=ids, attention_mask=mask).last_hidden_state.square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_a_saved_model_keeps_it(tmp_path: str) -> None:
    model = modeling_eff_performer.EffPerformerModel(tiny_config("eff_performer", exact_below=17))
    model.save_pretrained(tmp_path)
    assert modeling_eff_performer.EffPerformerModel.from_pretrained(tmp_path).config.exact_below == 17


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EffPerformerConfig(exact_below=-1), "exact_below = -1"),
        (lambda: EffReformerConfig(exact_below=-1), "exact_below = -1"),
        (lambda: EffPerformerConfig(exact_below=9, is_decoder=True), "causal"),
        (lambda: EffReformerConfig(exact_below=9, is_decoder=True), "causal"),
        (lambda: EffPerformerConfig(exact_below=9, kernel="relu"), "kernel = 'relu'"),
        (lambda: PerformerOptions(exact_below=-2).check_options(), "exact_below = -2"),
        (lambda: LSHOptions(exact_below=3).check_lsh_options(True), "exact_below = 3"),
    ],
)
def test_what_it_does_not_go_with_is_refused(make: callable, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_causal_model_with_performer_inside_is_refused() -> None:
    model = use_efficient_attention(MODELS["Llama"].build(), "performer")
    with pytest.raises(ValueError, match="exact_below = 9 in the causal form"):
        use_efficient_attention(model, "performer", exact_below=9)(input_ids=torch.randint(5, 60, (1, 12)))
