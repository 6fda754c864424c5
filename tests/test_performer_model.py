"""EffPerformer's projections: drawn from a seed, kept with the weights, redrawn on request; and weights of BERT."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import TINY, collect_warnings, mask_of, model_class, no_warnings, random_ids, randomise_, tiny_config
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    Trainer,
    TrainingArguments,
)

from hf_efficient_attn import EffPerformerConfig, EffPerformerForMaskedLM, EffPerformerModel, RedrawProjections
from hf_efficient_attn.attention.performer import PerformerOptions, draw_projection


FAMILY = "eff_performer"


def build(auto: str = "AutoModel", **overrides: Any) -> Any:
    return randomise_(model_class(FAMILY, auto)(tiny_config(FAMILY, **overrides)))


def projections(model: nn.Module) -> list[Tensor]:
    return [x.clone() for name, x in model.named_buffers() if name.endswith("projection")]


def test_a_projection_is_a_function_of_seed_layer_and_redraw() -> None:
    first, again, other = (build(projection_seed=seed) for seed in (3, 3, 4))
    assert [x.shape for x in projections(first)] == [(20, 8), (20, 8)]
    for number, projection in enumerate(projections(first)):
        drawn = draw_projection(20, 8, orthogonal=True, seed=3, layer=number, redraw=0)
        assert torch.equal(projection, drawn.float())
        assert torch.equal(projection, projections(again)[number])
    every = [*projections(first), *projections(other)]
    first.redraw_projections_(1)
    every += projections(first)
    assert len({tuple(x.flatten().tolist()) for x in every}) == 6, "all differ"
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again.redraw_projections_(1)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is left alone"
    assert all(torch.equal(a, b) for a, b in zip(projections(first), projections(again), strict=True))
    first.redraw_projections_(0)
    assert all(torch.equal(a, b) for a, b in zip(projections(first), every[:2], strict=True))


def test_options_of_the_draw() -> None:
    assert PerformerOptions(num_features=None).features_of(64) == 266
    assert PerformerOptions(num_features=None).features_of(1) == 1
    with torch.device("meta"):
        model = EffPerformerModel(tiny_config(FAMILY))
    assert projections(model)[0].is_meta
    rows = draw_projection(16, 8, orthogonal=False, seed=0, layer=0, redraw=0)
    assert (rows[:8] @ rows[:8].T).fill_diagonal_(0.0).abs().max() > 0.1
    assert not torch.equal(build(orthogonal=False).encoder.layer[0].attention.self.projection, projections(build())[0])


@torch.no_grad()
def test_a_redraw_moves_the_estimate_and_nothing_else() -> None:
    model, ids = build(), random_ids(2, 30)
    weights = {name: x.clone() for name, x in model.named_parameters()}
    before = model(ids).last_hidden_state
    model.redraw_projections_(5)
    assert not torch.allclose(model(ids).last_hidden_state, before, atol=1e-4)
    assert all(torch.equal(weights[name], x) for name, x in model.named_parameters())


@pytest.mark.parametrize("redraw", [0, 2])
def test_projections_are_saved_with_the_weights(redraw: int, tmp_path: Path) -> None:
    model = build(projection_seed=5)
    model.redraw_projections_(redraw)
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 30)
    for options in ({}, {"device_map": "cpu"}, {"projection_seed": 9}):
        with no_warnings():
            again = EffPerformerModel.from_pretrained(tmp_path, **options).eval()
        assert all(torch.equal(a, b) for a, b in zip(projections(again), projections(model), strict=True))
        torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, rtol=0, atol=1e-6)
    half = EffPerformerModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(projections(half), projections(model), strict=True))


@torch.no_grad()
def test_half_precision_estimates_as_well() -> None:
    """A rounded projection is hardly another one, and features are computed in fp32."""
    model, ids = build(num_features=64), random_ids(2, 60)
    right = model(ids).last_hidden_state
    ours = copy.deepcopy(model).to(torch.bfloat16)(ids).last_hidden_state
    assert (ours - right).abs().max() <= 0.05 * right.abs().max()


def test_all_backends_take_the_same_projection() -> None:
    ids, keep = random_ids(3, 70), mask_of([70, 31, 1], 70, "left")
    found = []
    for backend in ("sdpa", "eager"):
        model = build(attn_implementation=backend)
        result = model(ids, keep).last_hidden_state[keep.bool()]
        found.append([result, *torch.autograd.grad(result.square().sum(), list(model.parameters()), allow_unused=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def make_trainer(folder: Path, *callbacks: Any, steps: int = 6) -> Trainer:
    ids = random_ids(24, 12)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    model = build("AutoModelForSequenceClassification", num_labels=3, hidden_dropout_prob=0.1)
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))


def test_redraws_in_training_and_after_a_resume(tmp_path: Path) -> None:
    """Six steps in one go, or stopped after three and resumed by another process: the same to the bit."""
    seen: list[tuple[int, list[Tensor]]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            seen.append((state.global_step, projections(model)))

    whole = make_trainer(tmp_path / "whole", RedrawProjections(every=2), Watch())
    whole.train()
    for step, found in seen:
        for layer, projection in enumerate(found):
            drawn = draw_projection(20, 8, orthogonal=True, seed=0, layer=layer, redraw=step // 2)
            assert torch.equal(projection, drawn.float())
    resumed = make_trainer(tmp_path / "resumed", RedrawProjections(every=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(seen[0][1][0], seen[-1][1][0])


def test_redraws_need_a_time_and_a_performer(tmp_path: Path) -> None:
    for wrong in (0, 1.5, True, None, "3"):
        with pytest.raises(ValueError, match=f"every = {wrong!r}.*1 or more"):
            RedrawProjections(every=wrong)
    trainer = make_trainer(tmp_path, RedrawProjections(every=1), steps=1)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear without Performer layers"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def roberta_config() -> RobertaConfig:
    return RobertaConfig(**TINY, pad_token_id=1)


# What in-tree models are saved from, and ours loads into.
SOURCES = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**TINY)), EffPerformerForMaskedLM),
    "bert encoder": (lambda: BertForMaskedLM(BertConfig(**TINY)), EffPerformerModel),
    "roberta": (lambda: RobertaForMaskedLM(roberta_config()), EffPerformerForMaskedLM),
    "roberta encoder": (lambda: RobertaForMaskedLM(roberta_config()), EffPerformerModel),
    "bare roberta": (lambda: RobertaModel(roberta_config()), EffPerformerModel),
}


@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_starts_from_bert_and_roberta(source: str, tmp_path: Path) -> None:
    """Every weight by name; what is new are the projections, which transformers reports; with many, nearly the same."""
    make, cls = SOURCES[source]
    original = randomise_(make(), std=0.1)
    original.save_pretrained(tmp_path / "original")
    with collect_warnings() as found:
        ours, info = cls.from_pretrained(tmp_path / "original", num_features=8192, output_loading_info=True)
    ours.eval()
    assert not any("of type" in text for text in found), found
    assert any("projection" in text for text in found), found
    pooled = {name for name in info["missing_keys"] if "pooler" in name}
    assert all(name.endswith("projection") for name in set(info["missing_keys"]) - pooled)
    assert not pooled or source.endswith("encoder")
    assert not info["mismatched_keys"]
    for number, projection in enumerate(projections(ours)):
        drawn = draw_projection(8192, 8, orthogonal=True, seed=0, layer=number, redraw=0)
        assert torch.equal(projection, drawn.float()), "what a checkpoint lacks is drawn, not left over"

    inputs = {"input_ids": random_ids(2, 30), "attention_mask": mask_of([30, 17], 30)}
    seen = inputs["attention_mask"].bool()
    if source.endswith("encoder") and hasattr(original, "base_model"):
        original = original.base_model
    right, result = (model(**inputs)[0][seen] for model in (original, ours))
    assert (result - right).abs().max() <= 0.02 * right.abs().max()

    # Saved, it has our names, whatever was read.
    ours.save_pretrained(tmp_path / "ours")
    with no_warnings():
        again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for (name, a), b in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_positions_of_bert_and_roberta_configs(tmp_path: Path) -> None:
    BertConfig(**TINY).save_pretrained(tmp_path / "bert")
    roberta_config().save_pretrained(tmp_path / "roberta")
    with no_warnings():
        bert, roberta = (EffPerformerConfig.from_pretrained(tmp_path / name) for name in ("bert", "roberta"))
        given = EffPerformerConfig.from_pretrained(tmp_path / "roberta", position_offset=5)
    assert (bert.first_position, roberta.first_position, given.first_position) == (0, 2, 5)
    assert bert.model_type == roberta.model_type == FAMILY
    assert EffPerformerConfig().attention_probs_dropout_prob == 0.0
