"""Every family on two processes (gloo, CPU): DDP through Trainer, FSDP2 and tensor parallelism of transformers.

Starting processes costs more than what they do here, so two pairs do everything, each for half of the families.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed_sharding import KINDS, logits_of, sharded_heads, steps, whole_batch
from distributed_training import heads_of, make_model, scenarios_of, train
from electra_cases import joint_model
from helpers import model_class
from processes import run_two
from torch import Tensor

from hf_efficient_attn.auto import FAMILIES, TEXT_FAMILIES
from hf_efficient_attn.encoder.layer import FeedForwardLayer
from hf_efficient_attn.encoder.reversible_layer import ReversibleLayer


WORK = """
from pathlib import Path
from distributed_sharding import shard_and_train
from distributed_training import heads_of, quiet, scenarios_of, train, without_gradient

quiet()
found = {{}}
for family in {families!r}:
    own = Path(folder) / family
    found[family] = {{
        "trained": {{scenario.name: train(family, scenario, own / "trainer") for scenario in scenarios_of(family)}},
        "without gradient": {{auto: without_gradient(family, auto, rank) for auto in heads_of(family)}},
        "sharded": shard_and_train(family, own),
    }}
torch.save(found, f"{{folder}}/found-{{rank}}")
"""


def differences(what: str, found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> Iterator[str]:
    """Yields a line for each tensor that is not the expected one."""
    if found.keys() != expected.keys():
        yield f"{what}: has {sorted(found.keys() ^ expected.keys())} on one side only"
        return
    for name, x in expected.items():
        if not torch.allclose(found[name], x, rtol=1e-5, atol=atol):
            yield f"{what}: {name} is off by {(found[name] - x).abs().max():.1e}"


def trained_as_one(family: str, found: list[dict], folder: Path) -> Iterator[str]:
    """Losses and weights of both ranks against one process, which have moved."""
    for scenario in scenarios_of(family):
        alone = train(family, scenario, folder / "alone")
        for rank, part in enumerate(found):
            both, what = part["trained"][scenario.name], f"{scenario.name}, rank {rank}"
            yield from differences(what, both.after, alone.after)
            if rank == 0 and both.losses != pytest.approx(alone.losses, rel=1e-5, abs=1e-5):
                yield f"{what}: losses are {both.losses}, alone {alone.losses}"
        still = [name for name, x in alone.after.items() if torch.equal(x, alone.before[name])]
        moved = max((x - alone.before[name]).abs().max().item() for name, x in alone.after.items())
        if moved < 1e-2 or len(set(alone.losses)) < len(alone.losses):
            yield f"{scenario.name}: weights have moved by {moved} only, {still} not at all"


def sharded_as_one(family: str, found: list[dict], folder: Path) -> Iterator[str]:
    """Losses and the saved checkpoint against one process, the checkpoint's logits, and what was sharded."""
    for auto in sharded_heads(family):
        model = make_model(family, auto)
        names = {name for name, _ in model.named_parameters()}
        units = {name for name, x in model.named_modules() if isinstance(x, FeedForwardLayer | ReversibleLayer)}
        batch = whole_batch(family, model, auto)
        losses = steps(model, batch)
        for kind in KINDS:
            if (kind, auto) not in found[0]["sharded"]:
                continue
            what, both = f"{auto}, {kind}", found[0]["sharded"][kind, auto]
            if both.losses != pytest.approx(losses, rel=1e-5, abs=1e-5):
                yield f"{what}: losses are {both.losses}, alone {losses}"
            saved = model_class(family, auto).from_pretrained(folder / f"{auto}-{kind}")
            yield from differences(f"{what}, saved", dict(saved.state_dict()), dict(model.state_dict()))
            yield from differences(f"{what}, saved", {"logits": logits_of(saved, batch)}, {"logits": both.logits})
            expected = {name for name in names if is_split(model, name)} if kind == "tp" else names
            if both.sharded != expected:
                yield f"{what}: sharded is not what is expected: {sorted(both.sharded ^ expected)}"
            if kind != "tp" and not units <= both.units:
                yield f"{what}: {sorted(units - both.units)} are no units"


def is_split(model: torch.nn.Module, name: str) -> bool:
    """Whether tensor parallelism splits (or, for a bias after a sum, repeats) a parameter: by the sizes of its map."""
    owner = model.get_submodule(name.rpartition(".")[0])
    inner = model.config.intermediate_size
    inside = "encoder." in name and isinstance(owner, torch.nn.Linear)
    return inside and inner in (owner.in_features, owner.out_features)


HEADS = [(family, auto) for family in FAMILIES for auto in heads_of(family)]


@pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{family}-{auto}" for family, auto in HEADS])
def test_plans_name_all_layers(family: str, auto: str) -> None:
    """Units of FSDP2 are the layers and the word embeddings; tensor parallelism splits feed-forward parts."""
    model = make_model(family, auto)
    modules = {re.sub(r"\.\d+(?=\.|$)", ".*", name): module for name, module in model.named_modules()}
    units = {modules[name] for name in model._fsdp_plan}
    layers = {x for x in modules.values() if isinstance(x, FeedForwardLayer | ReversibleLayer)}
    embeddings = {model.get_input_embeddings()} if family in TEXT_FAMILIES else set()
    assert len(layers) == 1 and units == layers | embeddings
    inner, first, second = model.config.intermediate_size, [], []
    for name, style in model.tp_plan.items():
        # The oldest transformers adds a rule for a module that is called otherwise here.
        if not name.endswith("embed_tokens"):
            (first if style == "colwise" else second).append(modules[name])
    assert [x.out_features for x in first] == [x.in_features for x in second] == [inner]
    of_layer = [x for x in next(iter(layers)).modules() if isinstance(x, torch.nn.Linear)]
    assert {x for x in of_layer if inner in (x.in_features, x.out_features)} == {*first, *second}


@pytest.mark.parametrize("sharing", ["embeddings", "none"])
def test_plans_of_joint_pretraining_name_modules_that_share_nothing(sharing: str) -> None:
    model = joint_model(sharing=sharing)
    modules = {re.sub(r"\.\d+(?=\.|$)", ".*", name): module for name, module in model.named_modules()}
    tied = {id(model.get_parameter(name)) for name in model.all_tied_weights_keys}
    assert len(model._fsdp_plan) >= 2
    for name in model._fsdp_plan:
        assert not tied & {id(x) for x in modules[name].parameters()}, name


@pytest.mark.parametrize("families", [list(FAMILIES)[::2], list(FAMILIES)[1::2]], ids=" ".join)
@pytest.mark.timeout(600)
def test_two_processes_train_as_one(families: list[str], tmp_path: Path) -> None:
    """With and without checkpointing and accumulation, global tokens on one rank only, uneven labels; and in pieces."""
    for family in families:
        for auto in sharded_heads(family):
            make_model(family, auto).save_pretrained(tmp_path / family / auto)
    run_two(WORK.format(families=families), tmp_path, timeout=500)
    found = [torch.load(tmp_path / f"found-{rank}", weights_only=False) for rank in range(2)]
    failures = []
    for family in families:
        parts = [part[family] for part in found]
        for check in (trained_as_one, sharded_as_one):
            failures += [f"{family}, {line}" for line in check(family, parts, tmp_path / family)]
        for rank, part in enumerate(parts):
            assert part["without gradient"].keys() == set(heads_of(family))
            for auto, names in part["without gradient"].items():
                failures += [f"{family}, {auto}, rank {rank}: no gradient for {names}"] * bool(names)
    assert not failures, "\n".join(failures)
