"""Inference on a CPU writes into memory that nobody needs any more: how little it takes, and whose it leaves alone."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import mask_of, model_class, random_ids, randomise_, tiny_config
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_efficient_attn.encoder import chunks
from hf_efficient_attn.functional import dense_execution, nystrom, nystrom_attention, performer_attention
from hf_efficient_attn.functional.sliding_window import sliding_window_attention


FAMILIES = ("eff_longformer", "eff_nystromformer", "eff_performer")
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
LENGTHS, LENGTH = [150, 97], 150
PROJECTION = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "window": lambda *tensors, **options: sliding_window_attention(*tensors, radius=8, **options),
    "performer": lambda *tensors, **options: performer_attention(*tensors, projection=PROJECTION, **options),
    "nystrom": lambda *tensors, **options: nystrom_attention(
        *tensors, num_landmarks=8, pinv_iterations=6, scale_per_matrix=True, **options
    ),
}
# Where no text is short, and where one of two is.
FORMULAS |= {f"performer, {bound}": partial(FORMULAS["performer"], exact_below=bound) for bound in (97, 98)}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiny texts are long."""
    monkeypatch.setattr(chunks, "TOKENS_AT_ONCE", 32)
    monkeypatch.setattr(nystrom, "TOKENS_AT_ONCE", 32)
    with dense_execution(False):
        yield


def build(family: str, **overrides: Any) -> nn.Module:
    """A tiny base model."""
    config = tiny_config(family, max_position_embeddings=LENGTH + 8, **overrides)
    return randomise_(model_class(family, "AutoModel")(config)).eval()


def inputs_of(family: str, padded: bool = True) -> dict[str, Tensor]:
    """Two texts, in Longformer with global tokens."""
    inputs = {"input_ids": random_ids(2, LENGTH)}
    if padded:
        inputs["attention_mask"] = mask_of(LENGTHS, LENGTH)
    if family == "eff_longformer":
        inputs["global_attention_mask"] = torch.zeros(2, LENGTH, dtype=torch.long)
        inputs["global_attention_mask"][:, [0, 40]] = 1
    return inputs


@EVERY_FAMILY
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"norm_position": "pre"}, {"dtype": torch.bfloat16}], ids=str)
def test_the_same_as_with_gradients(family: str, padded: bool, overrides: dict[str, Any]) -> None:
    overrides = dict(overrides)
    dtype = overrides.pop("dtype", torch.float32)
    model, inputs = build(family, **overrides).to(dtype), inputs_of(family, padded)
    expected = model(**inputs, output_hidden_states=True)
    with torch.no_grad():
        alone, found = model(**inputs), model(**inputs, output_hidden_states=True)
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    assert_close(alone.last_hidden_state, expected.last_hidden_state, **close)
    for states, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(states, other, **close)


@EVERY_FAMILY
def test_dropout_of_attention_is_the_same_with_and_without_gradients(family: str) -> None:
    """A pass that is computed again for its gradients has to drop what it dropped."""
    attention = build(family, attention_probs_dropout_prob=0.3).encoder.layer[0].attention.self.train()
    states, results = torch.randn(2, LENGTH, 32), []
    for grad in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            results.append(attention(states, None)[0])
    assert_close(*results, atol=1e-6, rtol=1e-5)


@EVERY_FAMILY
def test_what_the_caller_gives_stays(family: str) -> None:
    model, inputs = build(family), inputs_of(family)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    before = embeds.clone()
    layer, block = model.encoder.layer[0], model.encoder.layer[0].attention
    with torch.no_grad():
        for padding in ({"attention_mask": inputs.pop("attention_mask")}, {}):
            model(inputs_embeds=embeds, **inputs, **padding)
            assert torch.equal(embeds, before)
        for module in (layer, block, block.self):
            module(embeds, None)
            assert torch.equal(embeds, before)
        # A module of somebody else's may hand on what it got.
        model.embeddings.forward = lambda inputs_embeds, *ids: inputs_embeds
        model(inputs_embeds=embeds, **inputs)
        assert torch.equal(embeds, before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tensors_that_show_no_memory() -> None:
    model = build("eff_longformer")
    embeds = torch.randn(3, 1, 9, 32)
    with torch.no_grad(), dense_execution(True):
        found = torch.vmap(lambda x: model(inputs_embeds=x).last_hidden_state)(embeds)
        assert_close(found[:, 0], model(inputs_embeds=embeds[:, 0]).last_hidden_state, atol=1e-5, rtol=1e-5)


@EVERY_FAMILY
def test_what_hooks_have_seen_stays(family: str) -> None:
    """Hooks and hooks before, on any one module, and those on all modules."""
    model, inputs = build(family), inputs_of(family)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, *seen: Any) -> None:
        kept.extend((x, x.clone()) for x in tree_leaves(seen) if isinstance(x, Tensor))

    places = [
        place
        for module in model.modules()
        if module is not model
        for place in (module.register_forward_hook, module.register_forward_pre_hook)
    ]
    for place in (*places, register_module_forward_hook, register_module_forward_pre_hook):
        handle = place(keep)
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        assert all(torch.equal(*pair) for pair in kept)
        kept.clear()


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("padded", [False, True])
def test_formulas_overwrite_where_they_may(formula: str, padded: bool) -> None:
    given = [torch.randn(2, LENGTH, 2, 8, generator=torch.Generator().manual_seed(i)).transpose(1, 2) for i in range(3)]
    tensors, mask = [x.clone() for x in given], mask_of(LENGTHS, LENGTH).bool() if padded else None
    expected = FORMULAS[formula](*tensors, mask)
    assert all(map(torch.equal, tensors, given))
    found = FORMULAS[formula](*tensors, mask, overwrite=True)
    assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found.data_ptr() == tensors[0].data_ptr()


class LiveBytes(TorchDispatchMode):
    """Counts what tensors made inside take, and the most there was."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self._held.pop(key)


@pytest.mark.parametrize(
    ("family", "overrides"), [*((family, {}) for family in FAMILIES), ("eff_performer", {"exact_below": 512})], ids=str
)
@pytest.mark.parametrize("padded", [False, True])
def test_memory_of_a_long_text(
    family: str, overrides: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, queries that become results, keys and values, and what the kernels need besides for one head."""
    length, hidden = 16_384, 64
    monkeypatch.setattr(chunks, "TOKENS_AT_ONCE", 512)
    monkeypatch.setattr(nystrom, "TOKENS_AT_ONCE", 512)
    for name in ("window_cpu", "favor_cpu"):
        monkeypatch.setattr(f"hf_efficient_attn.functional.{name}.CHUNK_BYTES", 2**16)
    sizes = {"hidden_size": hidden, "num_attention_heads": 8, "intermediate_size": 2 * hidden}
    config = tiny_config(family, max_position_embeddings=length + 8, num_hidden_layers=2, **sizes, **overrides)
    model, ids = model_class(family, "AutoModel")(config).eval(), random_ids(1, length)
    inputs = {"attention_mask": mask_of([length - 100], length)} if padded else {}
    if family == "eff_longformer" and not padded:
        inputs["global_attention_mask"] = (torch.arange(length)[None] < 2).long()
    with torch.no_grad(), LiveBytes() as live:
        model(input_ids=ids, **inputs)
    assert 4.0 <= live.peak / (length * hidden * 4) < 4.8
