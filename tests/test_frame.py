"""The encoder frame around plain softmax attention, where transformers' BERT, RoBERTa and ELECTRA are the reference."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from frame_family import BERT, LENGTHS, ROBERTA, TASKS, FrameConfig, build, inputs_for, labels_for
from helpers import TINY, mask_of, no_warnings, random_ids, randomise_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, ElectraConfig, ElectraModel, RobertaConfig, Trainer, TrainingArguments
from transformers.activations import ACT2FN

from hf_efficient_attn.encoder import chunks
from hf_efficient_attn.encoder.activations import activation


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BACKENDS = ("eager", "sdpa")

EVERY_TASK = pytest.mark.parametrize("task", TASKS)
EVERY_FAMILY = pytest.mark.parametrize("family", [BERT, ROBERTA], ids=["bert", "roberta"])


def assert_same(task: str, mine: Any, theirs: Any, mask: Tensor, other_mask: Tensor | None = None) -> None:
    """Every output of `task` is equal, at valid tokens where it has a row a token."""
    for name, by_token in TASKS[task].items():
        if name == "pooler_output" and theirs[name] is None:
            continue
        keep, other = (
            (m.bool() if by_token else slice(None)) for m in (mask, mask if other_mask is None else other_mask)
        )
        assert_close(mine[name][keep], theirs[name][other], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@EVERY_TASK
@pytest.mark.parametrize("backend", BACKENDS)
def test_bert(task: str, backend: str) -> None:
    ours = build(BERT, task, backend)
    num_labels = 2 if task == "ForQuestionAnswering" else 3
    theirs = getattr(transformers, f"Bert{task}")(BertConfig(**TINY, num_labels=num_labels)).eval()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    inputs = inputs_for(task)
    with torch.no_grad():
        assert_same(task, ours(**inputs), theirs(**inputs), inputs["attention_mask"])
        for name in ("attention_mask", "token_type_ids"):
            fewer = {key: value for key, value in inputs.items() if key != name}
            every = fewer.get("attention_mask", torch.ones_like(inputs["attention_mask"]))
            assert_same(task, ours(**fewer), theirs(**fewer), every)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "Model"])
def test_bert_losses_and_gradients(task: str) -> None:
    ours = build(BERT, task).train()
    num_labels = 2 if task == "ForQuestionAnswering" else 3
    theirs = getattr(transformers, f"Bert{task}")(BertConfig(**TINY, num_labels=num_labels)).train()
    theirs.load_state_dict(ours.state_dict())
    inputs = inputs_for(task)
    if task == "ForQuestionAnswering":  # BERT's loss also runs over the padding, whose states are arbitrary
        inputs = {name: x[:1].expand(3, -1) for name, x in inputs.items()}
    labels = labels_for(task, inputs)
    losses = [model(**inputs, **labels).loss for model in (ours, theirs)]
    assert_close(losses[0], losses[1], **CLOSE)
    for loss in losses:
        loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name].grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "ForPreTraining"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_roberta(task: str, backend: str) -> None:
    """Positions start behind the pad id, and pad ids stand for the mask that RoBERTa has to be given."""
    ours = build(ROBERTA, task, backend)
    num_labels = 2 if task == "ForQuestionAnswering" else 3
    config = RobertaConfig(**TINY, num_labels=num_labels, pad_token_id=1)
    theirs = getattr(transformers, f"Roberta{task}")(config).eval()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    inputs = inputs_for(task, pad=1)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = theirs(**inputs)
        assert_same(task, ours(**inputs), expected, mask)
        del inputs["attention_mask"]
        assert_same(task, ours(**inputs), expected, mask)


def test_electra_has_narrow_embeddings() -> None:
    config = ElectraConfig(**TINY, embedding_size=16)
    theirs = randomise_(ElectraModel(config))
    ours = BERT.Model(FrameConfig(**TINY, embedding_size=16), add_pooling_layer=False).eval()
    assert ours.embeddings_project.weight.shape == (32, 16)
    ours.load_state_dict(theirs.state_dict())
    inputs = inputs_for("Model")
    with torch.no_grad():
        mine = ours(**inputs)
        assert_same("Model", mine, {**theirs(**inputs), "pooler_output": None}, inputs["attention_mask"])
    assert mine.pooler_output is None


def test_narrow_embeddings_in_a_masked_lm() -> None:
    """The head comes back down to the embeddings' width, so that it can be tied; so do `inputs_embeds`."""
    for family in (BERT, ROBERTA):
        model = build(family, "ForMaskedLM", embedding_size=16)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        inputs = inputs_for("ForMaskedLM", pad=model.config.pad_token_id)
        loss = model(**inputs, **labels_for("ForMaskedLM", inputs)).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        with torch.no_grad():
            assert model(inputs_embeds=embeds, **inputs).logits.shape == (3, 13, 64)


def pre_norm_reference(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """A pre-norm Transformer in plain torch, without padding."""
    heads, eps = TINY["num_attention_heads"], 1e-12

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings.LayerNorm")
    for index in range(TINY["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        y = norm(x, f"{layer}.attention.output.LayerNorm")
        q, k, v = (
            dense(y, f"{layer}.attention.self.{n}").unflatten(-1, (heads, -1)) for n in ("query", "key", "value")
        )
        probs = (torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + dense(torch.einsum("bhqk,bkhd->bqhd", probs, v).flatten(2), f"{layer}.attention.output.dense")
        y = dense(norm(x, f"{layer}.output.LayerNorm"), f"{layer}.intermediate.dense")
        x = x + dense(F.gelu(y), f"{layer}.output.dense")
    return norm(x, "encoder.LayerNorm")


def test_pre_norm() -> None:
    model = build(BERT, "Model", norm_position="pre")
    ids = random_ids(2, 13)
    with torch.no_grad():
        assert_close(model(ids).last_hidden_state, pre_norm_reference(model.state_dict(), ids), **CLOSE)


@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("chunk", [1, 3, 5, 13, 100])
def test_chunked_feed_forward(chunk: int, norm_position: str) -> None:
    whole = build(BERT, "Model", norm_position=norm_position)
    parts = build(BERT, "Model", norm_position=norm_position, chunk_size_feed_forward=chunk)
    sizes: list[int] = []
    dense = parts.encoder.layer[0].intermediate.dense
    dense.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[1]))
    inputs = inputs_for("Model")
    with torch.no_grad():
        assert_same("Model", parts(**inputs), whole(**inputs), torch.ones(3, 13))
    assert sum(sizes) == 13 and max(sizes) <= chunk


def test_other_devices_take_chunks_above_what_the_config_names() -> None:
    """Where nothing is computed: which chunks there would be."""
    layer = build(BERT, "Model").encoder.layer[0]
    states = torch.empty(1, 20_000, 8, device="meta")
    with torch.no_grad():
        assert chunks.inference_chunk(states, layer.output, above=20_000) == 0
        size = chunks.inference_chunk(states, layer.output, above=19_999)
        assert 0 < size <= 1.125 * chunks.TOKENS_FOR_MEMORY and -(-20_000 // size) * size - 20_000 < size
        handle = layer.output.dense.register_forward_hook(lambda *args: None)
        assert chunks.inference_chunk(states, layer.output, above=19_999) == 0, "hooks see whole texts"
        handle.remove()
    assert chunks.inference_chunk(states, layer.output, above=19_999) == 0, "a backward pass may follow"
    with pytest.raises(ValueError, match="chunk_above = 0: it must be 1 or more"):
        build(BERT, "Model", chunk_above=0)


def test_long_texts_in_chunks_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference on a CPU cuts work on single tokens; not where gradients are wanted, and hooks see whole texts."""
    model, inputs = build(BERT, "Model"), inputs_for("Model")
    whole, sizes = model(**inputs), []
    forward = nn.LayerNorm.forward

    def counted(self: nn.Module, hidden_states: Tensor) -> Tensor:
        sizes.append(hidden_states.shape[1])
        return forward(self, hidden_states)

    monkeypatch.setattr(chunks, "TOKENS_AT_ONCE", 5)
    monkeypatch.setattr(nn.LayerNorm, "forward", counted)
    with torch.no_grad():
        assert_same("Model", model(**inputs), whole, torch.ones(3, 13))
    assert sizes == [5, 5, 3] * 5  # embeddings, and attention and feed-forward of two layers
    sizes.clear()
    model(**inputs)
    assert sizes == [13] * 5
    sizes.clear()
    for module in (model.embeddings.dropout, model.encoder.layer[0].attention.output.dense):
        module.register_forward_hook(lambda *args: None)
    model.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        model(**inputs)
    assert sizes == [13, 13, 5, 5, 3, 5, 5, 3, 13]


@EVERY_TASK
@EVERY_FAMILY
def test_padding_side_is_exact(task: str, family: SimpleNamespace) -> None:
    """Also what stands in the padding, and the pooled first token, which is not the first position on the left."""
    if family is ROBERTA and task == "ForPreTraining":
        pytest.skip("RoBERTa predicts no next sentence")
    model = build(family, task)
    right, left = (inputs_for(task, side, pad=model.config.pad_token_id) for side in ("right", "left"))
    poisoned = {**left, "input_ids": torch.where(left["attention_mask"] == 1, left["input_ids"], 63)}
    poisoned["token_type_ids"] = torch.where(left["attention_mask"] == 1, left["token_type_ids"], 1)
    with torch.no_grad():
        expected = model(**right)
        for inputs in (left, poisoned):
            assert_same(task, model(**inputs), expected, left["attention_mask"], right["attention_mask"])
        if task == "ForMultipleChoice":
            return
        for row, length in enumerate(LENGTHS):
            alone = model(
                right["input_ids"][row : row + 1, :length], token_type_ids=right["token_type_ids"][row, None, :length]
            )
            one = {name: expected[name][row : row + 1] for name in TASKS[task] if expected[name] is not None}
            assert_same(task, alone, one, torch.ones(1, length), mask_of([length], max(LENGTHS)))


@EVERY_FAMILY
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification", "ForMultipleChoice"])
def test_inputs_embeds(task: str, side: str, family: SimpleNamespace) -> None:
    """The same results and gradients as from ids, even with NaN in the embeddings of padding."""
    model = build(family, task).train()
    inputs = inputs_for(task, side, pad=model.config.pad_token_id)
    mask = inputs["attention_mask"]
    runs = []
    for as_embeds in (False, True):
        given = dict(inputs)
        if as_embeds:
            embeds = model.get_input_embeddings()(given.pop("input_ids"))
            given["inputs_embeds"] = embeds.masked_fill(mask[..., None] == 0, float("nan"))
        model.zero_grad()
        outputs = model(**given)
        states = [outputs[name][mask.bool()] if by_token else outputs[name] for name, by_token in TASKS[task].items()]
        sum(state.square().sum() for state in states).backward()
        runs.append((states, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (states, gradients), (other_states, other_gradients) = runs
    for state, other in zip(states, other_states, strict=True):
        assert_close(other, state, **CLOSE)
    for name, gradient in gradients.items():
        assert_close(
            other_gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_token_types_matter_and_may_be_absent() -> None:
    model, ids = build(BERT, "Model"), random_ids(2, 9)
    with torch.no_grad():
        zeros = model(ids).last_hidden_state
        assert_close(model(ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state, zeros, atol=0.0, rtol=0.0)
        assert (model(ids, token_type_ids=torch.ones_like(ids)).last_hidden_state - zeros).abs().max() > 1e-2
        one_row = model(ids, token_type_ids=(ids % 2)[:1]).last_hidden_state
        assert_close(one_row, model(ids, token_type_ids=(ids % 2)[:1].expand(2, -1)).last_hidden_state, **CLOSE)
    without = build(BERT, "Model", type_vocab_size=0)
    assert not any("token_type" in name for name in without.state_dict())
    assert without(ids).last_hidden_state.shape == (2, 9, 32)


# num_labels, config.problem_type, labels, the loss as a formula
SEQUENCE_LOSSES = {
    "one target": (1, None, torch.tensor([0.5, -1.0, 2.0]), lambda x, y: (x[:, 0] - y).square().mean()),
    "one target, column": (1, None, torch.tensor([[0.5], [-1.0], [2.0]]), lambda x, y: (x - y).square().mean()),
    "three targets": (
        3,
        "regression",
        torch.tensor([[0.5, -1, 2], [0, 1, 2], [3, 1, -1]]),
        lambda x, y: (x - y).square().mean(),
    ),
    "integer targets": (1, None, torch.tensor([1, 0, 5]), lambda x, y: (x[:, 0] - y).square().mean()),
    "classes": (3, None, torch.tensor([2, 0, 1]), lambda x, y: -x.log_softmax(1)[[0, 1, 2], y].mean()),
    "a missing class": (3, None, torch.tensor([2, -100, 1]), lambda x, y: -x.log_softmax(1)[[0, 2], y[[0, 2]]].mean()),
    "several classes": (
        3,
        None,
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]]),
        lambda x, y: -(y * x.sigmoid().log() + (1 - y) * (-x).sigmoid().log()).mean(),
    ),
    "integer flags": (
        3,
        "multi_label_classification",
        torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        lambda x, y: -(y * x.sigmoid().log() + (1 - y) * (-x).sigmoid().log()).mean(),
    ),
}


@EVERY_FAMILY
@pytest.mark.parametrize("kind", SEQUENCE_LOSSES)
def test_sequence_classification_labels(kind: str, family: SimpleNamespace) -> None:
    num_labels, problem, labels, formula = SEQUENCE_LOSSES[kind]
    model = build(family, "ForSequenceClassification", num_labels=num_labels, problem_type=problem)
    with torch.no_grad():
        outputs = model(**inputs_for("ForSequenceClassification", pad=model.config.pad_token_id), labels=labels)
    assert_close(outputs.loss, formula(outputs.logits, labels), **CLOSE)
    assert model.config.problem_type == problem


@pytest.mark.parametrize("task", ["ForMaskedLM", "ForTokenClassification"])
def test_num_items_in_batch(task: str) -> None:
    """Trainer passes the number of labels of a whole accumulated batch; the parts then add up to its mean."""
    model, inputs = build(BERT, task), inputs_for(task)
    labels = labels_for(task, inputs)["labels"]
    labels[1, 2:] = -100
    items = (labels != -100).sum()
    with torch.no_grad():
        whole = model(**inputs, labels=labels).loss
        parts = [
            model(
                **{k: v[i : i + 1] for k, v in inputs.items()}, labels=labels[i : i + 1], num_items_in_batch=items
            ).loss
            for i in range(3)
        ]
    assert_close(sum(parts), whole, **CLOSE)
    assert abs(parts[0] - whole) > 1e-2


@pytest.mark.parametrize(
    "task", ["ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification"]
)
def test_accumulated_gradients_report_one_loss(task: str, tmp_path: Path) -> None:
    """Four parts of a batch or all at once: the same reported losses and the same weights after two steps."""
    # As many labels in each row for ForPreTraining, whose mean over parts is the mean over all only then.
    ids, mask = random_ids(8, 13), mask_of([13, 4, 9, 13, 6, 13, 10, 13], 13)
    mask = torch.ones_like(mask) if task == "ForPreTraining" else mask
    rows: dict[str, Any] = {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}
    if task == "ForSequenceClassification":
        rows["labels"] = ids[:, 0] % 3
    else:
        rows["labels"] = (ids % (3 if task == "ForTokenClassification" else 64)).masked_fill(mask == 0, -100)
    if task == "ForPreTraining":
        rows["next_sentence_label"] = ids[:, 0] % 2
    data = Dataset.from_dict({name: value.tolist() for name, value in rows.items()})
    results = []
    for accumulate in (1, 4):
        model = build(BERT, task)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accumulate)),
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            optim="sgd",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        results.append(([log["loss"] for log in trainer.state.log_history if "loss" in log], model.state_dict()))
    (losses, weights), (parted_losses, parted_weights) = results
    assert len(losses) == 2 and losses[0] != losses[1]
    assert parted_losses == pytest.approx(losses, abs=2e-4)
    for name, weight in weights.items():
        assert_close(parted_weights[name], weight, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@EVERY_FAMILY
@pytest.mark.parametrize("size", [50, 71])
@pytest.mark.parametrize("embedding_size", [None, 16])
def test_resize_token_embeddings(
    size: int, embedding_size: int | None, family: SimpleNamespace, tmp_path: Path
) -> None:
    model = build(family, "ForMaskedLM", embedding_size=embedding_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = random_ids(2, 9, vocab_size=50)
    with torch.no_grad():
        logits = model(ids).logits
    with no_warnings():
        model.resize_token_embeddings(size, mean_resizing=False)
    model.eval()
    decoder, vocabulary, words = model.get_output_embeddings(), model._head.vocabulary, model.get_input_embeddings()
    assert model.config.vocab_size == words.num_embeddings == decoder.out_features == size
    assert decoder.weight is words.weight and decoder.bias is vocabulary.bias and decoder.bias.shape == (size,)
    kept = min(size, 64)
    for name, tensor in model.state_dict().items():
        rows = kept if tensor.shape[0] == size else None  # the rest keeps its shape
        assert torch.equal(tensor[:rows], before[name][:rows]), name
    with torch.no_grad():
        resized = model(ids).logits
    assert resized.shape == (2, 9, size)
    assert_close(resized[..., :kept], logits[..., :kept], **CLOSE)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    with no_warnings():
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_close(again(ids).logits, resized, **CLOSE)


@EVERY_FAMILY
@pytest.mark.parametrize("size", [64, 50, 71])
def test_untied_head(size: int, family: SimpleNamespace, tmp_path: Path) -> None:
    """`tie_word_embeddings=False`: a vocabulary projection of its own, saved and loaded as such, all of it trained."""
    model = build(family, "ForMaskedLM", tie_word_embeddings=False)
    if size != 64:
        model.resize_token_embeddings(size, mean_resizing=False)
    model.eval()
    decoder = model.get_output_embeddings()
    assert decoder.weight is not model.get_input_embeddings().weight and decoder.out_features == size
    ids = random_ids(2, 9, vocab_size=50)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle, f"no gradient for {idle}"
    model.save_pretrained(tmp_path)
    with no_warnings():
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_close(again(ids).logits, outputs.logits, **CLOSE)


def test_reentrant_checkpointing_drops_the_same() -> None:
    """Its first pass has no gradients, in which a long text would go in chunks, each with a draw of its own."""
    layer = build(BERT, "Model", hidden_dropout_prob=0.3).train().encoder.layer[0]
    states = torch.randn(1, 1500, TINY["hidden_size"], generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for call in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)):
        torch.manual_seed(1)
        states.grad = None
        call(states).square().sum().backward()
        found.append(states.grad)
    assert_close(*found)


def test_the_fused_activation_is_transformers_own() -> None:
    x = torch.linspace(-6, 6, 500, dtype=torch.float64)
    assert_close(activation("gelu_new")(x), ACT2FN["gelu_new"](x), rtol=0, atol=1e-14)
    assert type(activation("relu")) is type(ACT2FN["relu"])
