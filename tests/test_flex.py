"""The flex_attention backend: equal to the others, its table of blocks that of the mask, clear where it cannot work."""

from collections.abc import Iterator

import pytest
import torch
from cases import GRAPH_ROWS, Case, paddings, qkv, slots, some_tokens
from helpers import mask_of, model_class, random_ids, tiny_config
from test_families import TEXT_FAMILIES, build
from test_mechanisms import build as build_mechanism
from test_mechanisms import states_of
from torch import Tensor
from torch.nn import functional as F

from hf_efficient_attn.attention import ATTENTIONS
from hf_efficient_attn.functional import (
    flex_sliding_window_attention,
    select_tokens,
    sliding_window_allowed,
    sliding_window_attention,
    window_block_mask,
)


FLEX_ROWS = [(case, name) for case, name in GRAPH_ROWS if "flex_attention" in ATTENTIONS[case.name].backends]
ROW = pytest.mark.parametrize(("case", "variant"), FLEX_ROWS, ids=[f"{case.name}: {name}" for case, name in FLEX_ROWS])
WINDOW_ROWS = [(case, name) for case, name in FLEX_ROWS if case.name == "longformer"]
# Wide windows over whole blocks, up to an edge and one beyond it; the others as they are.
RADII = (127, 128, 129, 254, 255, 256, 257, 300)
TABLES = [(case, name, radius) for case, name in WINDOW_ROWS for radius in (RADII if "wide" in name else (None,))]
FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The kernel's plain form, which reads the mask's rule and not its table of blocks: quick on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


@ROW
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_equals_the_other_backends(case: Case, variant: str, uncompiled: None) -> None:
    flex, sdpa = (build_mechanism(case, variant, backend, torch.float32) for backend in ("flex_attention", "sdpa"))
    for length in (1, 63, 130, 300):
        for keep in paddings(3, length).values():
            is_global = case.variants[variant].is_global(3, length)
            context = {} if is_global is None else {"global_tokens": slots(is_global, keep)}
            states = states_of(3, length, torch.float32)
            ours, weights = flex(states, keep, **context)
            assert weights is None
            torch.testing.assert_close(ours, sdpa(states, keep, **context)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "variant", "radius"), TABLES, ids=[f"{name} {radius}" for _, name, radius in TABLES])
@pytest.mark.parametrize("length", [1, 128, 129, 700])
def test_the_table_of_blocks_is_that_of_the_mask(case: Case, variant: str, length: int, radius: int | None) -> None:
    """A block stands in it if any pair of any head is allowed, as a whole one only if every pair is."""
    for keep in paddings(2, length).values():
        is_global = case.variants[variant].is_global(2, length)
        tokens = slots(is_global, keep)
        key = qkv(2, length, torch.float32)[1]
        options = case.variants[variant].options
        if radius is not None:
            options = {**options, "radius": radius}
        mask = window_block_mask(key, keep, tokens, **options)
        allowed = sliding_window_allowed(key, keep, tokens, **options).expand(2, 4, -1, -1)
        needed, whole = _blocks_of(allowed, keep)
        partly = _listed(mask.kv_num_blocks, mask.kv_indices)
        wholly = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        # The lists for a backward pass are the same pairs of blocks, by block of keys.
        assert torch.equal(_listed(mask.q_num_blocks, mask.q_indices).mT, partly)
        assert torch.equal(_listed(mask.full_q_num_blocks, mask.full_q_indices).mT, wholly)
        partly, wholly = (x.expand(2, -1, -1) for x in (partly, wholly))
        assert not (partly & wholly).any()
        assert (needed <= (partly | wholly)).all(), "no allowed pair may be missed"
        assert (wholly <= whole).all(), "no pair may be taken that is not allowed"
        # The table does not look at padding, nor for gaps between dilated keys.
        if keep is None and "dilated" not in variant:
            assert torch.equal(partly | wholly, needed), "and nothing is computed needlessly"
            # Of the last queries' block, which may have rows after the end, it asks more than it has to.
            assert is_global is not None or torch.equal(wholly[:, :-1], whole[:, :-1])


@pytest.mark.parametrize("causal", [False, True])
def test_every_block_with_a_global_token_is_listed(causal: bool) -> None:
    """Near and far, in one block or many, another number in each example; and none besides."""
    length = 1500
    marked = torch.zeros(2, length, dtype=torch.bool)
    marked[0, [3, 5, 400, 900, 1300, 1499]] = True
    marked[1, ::64] = True
    tokens, key = select_tokens(marked, 24), qkv(2, length, torch.float32)[1]
    mask = window_block_mask(key, None, tokens, radius=20, causal=causal)
    allowed = sliding_window_allowed(key, None, tokens, radius=20, causal=causal).expand(2, 4, -1, -1)
    needed, _ = _blocks_of(allowed, None)
    listed = _listed(mask.kv_num_blocks, mask.kv_indices) | _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(listed, needed)
    assert torch.equal(_listed(mask.q_num_blocks, mask.q_indices).mT, _listed(mask.kv_num_blocks, mask.kv_indices))


def _blocks_of(allowed: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Blocks `[batch, query blocks, key blocks]` with any pair allowed, and with every pair of a real query allowed."""
    batch, heads, length, _ = allowed.shape
    filled = -length % 128
    real = torch.ones(batch, length, dtype=torch.bool) if keep is None else keep
    pairs = [allowed, allowed | ~real[:, None, :, None]]
    grids = [
        F.pad(pair, (0, filled, 0, filled)).unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).transpose(3, 4)
        for pair in pairs
    ]
    # Rows after the end are nobody's.
    grids[1] = grids[1].clone()
    grids[1][:, :, -1, :, 128 - filled :] = True
    return grids[0].flatten(4).any(dim=4).any(dim=1), grids[1].flatten(4).all(dim=4).all(dim=1)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """flex_attention's lists of key blocks as bool `[batch, query blocks, key blocks]`."""
    found = torch.zeros(*indices.shape[:3], indices.shape[2] + 1, dtype=torch.bool)
    place = torch.arange(indices.shape[3]) < counts[..., None]
    # One block more than there is takes the rest of each list.
    listed = found.scatter(3, torch.where(place, indices, indices.shape[2]).long(), True)[:, 0, :, :-1]
    assert torch.equal(listed.sum(dim=2), counts[:, 0]), "none twice"
    return listed


@pytest.mark.parametrize("causal", [False, True])
def test_lists_are_as_long_as_a_window(causal: bool) -> None:
    """Not as the text: a text ten times as long has lists of ten times as many numbers, those of global tokens too."""
    numbers = []
    for length in (128 * 100, 128 * 1000):
        key = torch.empty(1, 2, length, 0, device="meta")
        mask = torch.empty(1, length, dtype=torch.bool, device="meta")
        tokens = select_tokens(mask, 5)
        with torch.no_grad():
            found = window_block_mask(key, mask, tokens, radius=256, causal=causal)
        assert found.q_indices is None, "nothing for a backward pass"
        plain = window_block_mask(key, radius=256, causal=causal)
        tables = (found.kv_indices, found.full_kv_indices, plain.kv_indices, plain.q_indices, plain.full_q_indices)
        numbers.append([x.numel() for x in tables])
    assert [10 * x for x in numbers[0]] == numbers[1]


@torch.no_grad()
def test_masks_of_shape_alone_are_kept() -> None:
    """Not on a CPU, where lists are long."""
    key = torch.empty(1, 2, 300, 0, device="meta")
    first = window_block_mask(key, radius=20)
    assert window_block_mask(key, radius=20) is first
    assert window_block_mask(key.expand(3, -1, -1, -1), radius=20) is first
    keep = torch.ones(1, 300, dtype=torch.bool, device="meta")
    assert window_block_mask(key, keep, radius=20) is not first
    for other in ({"radius": 21}, {"radius": 20, "causal": True}, {"radius": 20, "dilation": 2}):
        assert window_block_mask(key, **other) is not first
    assert window_block_mask(key[:, :, :299], radius=20) is not first
    key = torch.empty(1, 2, 300, 0)
    assert window_block_mask(key, radius=20) is not window_block_mask(key, radius=20)


def test_a_mask_can_be_shown_and_a_wrong_one_is_refused() -> None:
    key = torch.empty(1, 2, 700, 0)
    tokens = select_tokens(torch.arange(700)[None] % 100 == 3, 7)
    for shown in (window_block_mask(key, radius=20), window_block_mask(key, global_tokens=tokens, radius=20)):
        assert shown.to_dense().shape == (1, 1, 6, 6) and "BlockMask" in str(shown)
    for wrong in (torch.ones(1, 600, dtype=torch.bool), torch.ones(1, 700)):
        with pytest.raises(ValueError, match="key_padding_mask must be a bool tensor"):
            window_block_mask(key, wrong, radius=20)
    nothing = torch.empty(1, 2, 0, 16)
    with torch.no_grad():
        assert flex_sliding_window_attention(nothing, nothing, nothing, radius=3).shape == nothing.shape
    assert window_block_mask(nothing, radius=3).seq_lengths == (0, 0)


@torch.no_grad()
def test_no_number_of_global_tokens_compiles_anew() -> None:
    """Nor does padding: one text length is one graph on a CPU."""
    query, key, value = (x.detach() for x in qkv(2, 300, torch.float32))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for count in (0, 1, 6, 17):
        for keep in (None, torch.arange(300).expand(2, -1) < torch.tensor([[300], [211]])):
            every_16th = torch.arange(0, 16 * count, 16)
            marked = torch.zeros(2, 300, dtype=torch.bool).index_fill(1, every_16th, True)
            options = {"radius": 20, "global_tokens": select_tokens(marked, count) if count else None}
            ours = flex_sliding_window_attention(query, key, value, keep, **options)
            right = sliding_window_attention(query, key, value, keep, **options)
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_the_compiled_kernel_equals_the_others_on_a_cpu() -> None:
    """Several blocks, padding, global tokens; a second mask does not compile it again."""
    query, key, value = (x.detach() for x in qkv(2, 300, torch.float32))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for causal in (False, True):
        for keep in paddings(2, 300).values():
            tokens = slots(torch.arange(300).expand(2, -1) % 150 == 5, keep)
            options = {"radius": 140, "causal": causal, "global_tokens": tokens}
            ours = flex_sliding_window_attention(query, key, value, keep, **options)
            right = sliding_window_attention(query, key, value, keep, **options)
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_refuses_what_it_cannot_do() -> None:
    inputs = qkv(1, 20, torch.float32)
    with pytest.raises(ValueError, match="on a CPU is for inference only.*sdpa"):
        flex_sliding_window_attention(*inputs, radius=3)
    with torch.no_grad(), pytest.raises(ValueError, match="dropout_p = 0.1.*attention_probs_dropout_prob=0.0"):
        flex_sliding_window_attention(*inputs, radius=3, dropout_p=0.1)


@FAMILY
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_takes_it_by_name(family: str, uncompiled: None) -> None:
    if not model_class(family, "AutoModel")._supports_flex_attn:
        pytest.skip("this family has no flex_attention")
    model = build(family, "AutoModel", attn_implementation="flex_attention")
    ids, mask = random_ids(2, 70), mask_of([70, 41], 70, "left")
    with torch.no_grad():
        ours = model(ids, mask).last_hidden_state
        model.set_attn_implementation("sdpa")
        right = model(ids, mask).last_hidden_state
    model.set_attn_implementation("flex_attention")
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], right[seen], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="inference only"):
        model(ids, mask)
    dropping = build(family, "AutoModel", attn_implementation="flex_attention", attention_probs_dropout_prob=0.1)
    with torch.no_grad(), pytest.raises(ValueError, match="no dropout"):
        dropping.train()(ids, mask)
    with pytest.raises(ValueError, match="output_attentions.*eager"):
        model(ids, mask, output_attentions=True)


@FAMILY
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_generates_the_same(family: str, uncompiled: None) -> None:
    if "AutoModelForCausalLM" not in TEXT_FAMILIES[family].heads:
        pytest.skip("no causal form")
    if not model_class(family, "AutoModel")._supports_flex_attn:
        pytest.skip("this family has no flex_attention")
    model = build(family, "AutoModelForCausalLM", attn_implementation="flex_attention")
    inputs = {"input_ids": random_ids(2, 40), "attention_mask": mask_of([40, 23], 40, "left")}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    ours = model.generate(**inputs, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model.generate(**inputs, **options))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 5e-2)])
def test_gradients_on_cuda(causal: bool, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 700, 64, generator=generator, dtype=torch.float64) for _ in range(4)]
    keep = paddings(2, 700)["left"].cuda()
    tokens = slots(some_tokens(2, 700).cuda(), keep)
    options = {"radius": 100, "causal": causal, "global_tokens": tokens}
    found = []
    for formula, kind in ((flex_sliding_window_attention, dtype), (sliding_window_attention, torch.float64)):
        *qkv_cuda, weight = (x.to("cuda", kind).requires_grad_() for x in inputs)
        result = formula(*qkv_cuda, keep, **options)
        found.append([result, *torch.autograd.grad((result * weight).sum(), qkv_cuda)])
    for ours, right in zip(*found, strict=True):
        assert (ours.double() - right).abs().max() <= tolerance * right.abs().max()


def test_configs_name_it() -> None:
    assert tiny_config("eff_longformer", attn_implementation="flex_attention")._attn_implementation == "flex_attention"
