"""Model cards: what they say, that what they say works, and what happens to what somebody wrote."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from card_cases import build, card_of, edit, python_of
from datasets import Dataset
from helpers import DETECTOR, model_class, no_warnings, tiny_tokenizer
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer, TrainingArguments

import hf_efficient_attn
from hf_efficient_attn import (
    FAMILIES,
    EffElectraConfig,
    EffElectraForJointPreTraining,
    EffElectraJointConfig,
    ElectraTrainer,
    ModelCardCallback,
)


HEADS = [(family, auto) for family, row in FAMILIES.items() for auto in row.heads]
DETECTORS = [(family, DETECTOR) for family, row in FAMILIES.items() if row.detector is not None]

TASKS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
}


@pytest.mark.parametrize(("family", "auto"), HEADS + DETECTORS)
def test_a_saved_folder_says_how_it_is_loaded(
    family: str, auto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, auto)
    model.save_pretrained(tmp_path / "my-model")
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    text = card_of(tmp_path / "my-model")
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["tags"] == ["hf_efficient_attn", family]
    assert "license" not in data and "base_model" not in data
    named = next((task for head, task in TASKS.items() if model_class_or_none(family, head) is type(model)), None)
    if named is not None:
        assert data["pipeline_tag"] == named
    assert f'pip install "hf_efficient_attn>={hf_efficient_attn.__version__}"' in text
    assert f"`{type(model).__name__}` of hf_efficient_attn: " in text and "trust_remote_code=True" not in text
    for line in ("Base model", "Data", "Metrics"):
        assert f"- {line}: not recorded\n" in text
    for name, version in (
        ("transformers", transformers.__version__),
        ("hf_efficient_attn", hf_efficient_attn.__version__),
    ):
        assert f"- {name} {version}\n" in text
    # The snippet works, but for what was not saved here.
    monkeypatch.chdir(tmp_path)
    (snippet,) = python_of(text)
    found: dict[str, Any] = {}
    lines = [line for line in snippet.splitlines() if not line.startswith(("tokenizer =", "processor ="))]
    assert len(lines) == len(snippet.splitlines()) - 1
    exec("\n".join(lines), found)
    assert type(found["model"]) is type(model)


def model_class_or_none(family: str, auto: str) -> type | None:
    """The family's class for an Auto class, if it has one."""
    return model_class(family, auto) if auto in FAMILIES[family].heads else None


def test_the_snippet_reads_the_tokenizer_that_was_saved_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build().save_pretrained(tmp_path / "my-model")
    tiny_tokenizer().save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(python_of(card_of(tmp_path / "my-model"))[0], found)
    assert len(found["tokenizer"]("the fox")["input_ids"]) > 2


def test_options_that_are_not_the_defaults_are_listed(tmp_path: Path) -> None:
    build("eff_longformer", attention_window=[8, 4]).save_pretrained(tmp_path / "one")
    text = card_of(tmp_path / "one")
    assert "| `attention_window` | `[8, 4]` | `512` |" in text and "| `hidden_size` | `32` | `768` |" in text
    assert "`type_vocab_size`" not in text and "id2label" not in text
    joint_model().save_pretrained(tmp_path / "joint")
    assert "| `generator` | `a EffElectraConfig` |" in card_of(tmp_path / "joint")


def test_what_the_user_knows_is_recorded_and_nothing_else(tmp_path: Path) -> None:
    model = build()
    model.config._name_or_path = "someone/their-model"
    known = {
        "datasets": "stanfordnlp/imdb",
        "metrics": {"eval_accuracy": 0.912345678, "eval_runtime": 3.0, "epoch": 1.0},
        "license": "mit",
        "language": "en",
        "tags": "reviews",
        "summary": "It reads film reviews.",
    }
    model.save_pretrained(tmp_path / "one", card=known)
    data = ModelCard.load(tmp_path / "one" / "README.md").data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["stanfordnlp/imdb"])
    assert data.base_model == "someone/their-model" and data.tags[-1] == "reviews"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.912345678)
    assert (result.task_type, result.dataset_type) == ("text-classification", "stanfordnlp/imdb")
    text = card_of(tmp_path / "one")
    assert "| accuracy | 0.912346 |" in text and "runtime" not in text and "\nIt reads film reviews.\n" in text
    # It stays with the model, and what remains true also with one that is loaded from there.
    model.save_pretrained(tmp_path / "elsewhere" / "one")
    assert card_of(tmp_path / "elsewhere" / "one") == text
    loaded = type(model).from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "three")
    data = ModelCard.load(tmp_path / "three" / "README.md").data
    assert (data.license, data.base_model, data.datasets) == ("mit", "someone/their-model", ["stanfordnlp/imdb"])
    assert (
        data.eval_results == [result]
        and data.tags[-1] == "reviews"
        and "\nIt reads film reviews.\n" in card_of(tmp_path / "three")
    )
    loaded.save_pretrained(tmp_path / "one")  # also over itself
    assert card_of(tmp_path / "one") == text
    with torch.no_grad():
        loaded.classifier.out_proj.bias.add_(1)  # as training does: the figures are another model's
    loaded.save_pretrained(tmp_path / "one"), loaded.save_pretrained(tmp_path / "three")
    for place in ("one", "three"):
        data = ModelCard.load(tmp_path / place / "README.md").data
        assert data.eval_results is None and "- Metrics: not recorded" in card_of(tmp_path / place)
        assert data.license == "mit" and "\nIt reads film reviews.\n" in card_of(tmp_path / place)
    assert str(tmp_path) not in card_of(tmp_path / "three")  # no path of one's own in a card


def test_what_cards_do_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="card has 'dataset'.*Did you mean 'datasets'?"):
        build().save_pretrained(tmp_path / "one", card={"dataset": "imdb"})
    with pytest.raises(ValueError, match="give a dict"):
        build().save_pretrained(tmp_path / "one", card={"metrics": 0.9})
    wrong = {"license": ["mit"], "summary": 3, "tags": {"a": 1}, "datasets": [1], "metrics": {"f1": "high"}}
    for name, value in {**wrong, "language": True, "metrics": {"f1": torch.ones(2)}}.items():
        with pytest.raises(ValueError, match=f"card has {name} "):
            build().card_data = {name: value}
    assert not (tmp_path / "one").exists()
    model = build()
    with pytest.raises(ValueError, match="Did you mean 'license'?"):  # and not when the first checkpoint is saved
        model.card_data = {"licence": "mit"}
    assert model.card_data is None
    with pytest.raises(ValueError, match="there is no config.json"):
        build().write_card(tmp_path)


def test_figures_of_any_kind_are_recorded(tmp_path: Path) -> None:
    model = build()
    model.card_data = {"metrics": {"f1": np.float32(0.5), "loss": torch.tensor(0.25), "steps": np.int64(3)}}
    model.save_pretrained(tmp_path, card={"datasets": ("imdb", "of my own"), "license": None})
    assert all(f"| {row} |" in card_of(tmp_path) for row in ("f1 | 0.5", "loss | 0.25", "steps | 3"))
    type(model).from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "- Data: imdb, of my own\n" in card_of(tmp_path) and "| f1 | 0.5 |" in card_of(tmp_path)


def test_a_folder_that_is_gone_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build().save_pretrained("first", card={"license": "mit"})
    model = type(build()).from_pretrained("first")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("second")
    data = ModelCard(card_of(tmp_path / "elsewhere" / "second")).data
    assert data.get("base_model") is None and data.license == "mit"


def test_a_class_of_ones_own_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its card names what others can load, and code of the package that lacks it does not stand beside it."""
    parent = type(build())
    build().save_pretrained(tmp_path / "first", self_contained=True)
    mine = type("My", (parent,), {})
    model = mine.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "first"), model.save_pretrained(tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    for place in ("first", "second"):
        assert {path.name for path in (tmp_path / place).iterdir()} == {"README.md", "config.json", "model.safetensors"}
        text = card_of(tmp_path / place)
        assert f"`My`, a class of its own on `{parent.__name__}` of hf_efficient_attn" in text and "sha256" not in text
        found: dict[str, Any] = {}
        (snippet,) = python_of(text)
        exec("\n".join(line for line in snippet.splitlines() if not line.startswith("tokenizer =")), found)
        assert type(found["model"]) is parent


def test_a_head_without_auto_class_loads_from_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = build("eff_performer", DETECTOR)
    model.save_pretrained("detector", self_contained=True)
    found: dict[str, Any] = {}
    exec(python_of(card_of(tmp_path / "detector"))[1], found)
    # Where the package is installed, its class; where not, test_self_contained.py loads the file.
    assert type(found["model"]) is type(model)


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    for text in ("# Mine\n", "---\nlicense: mit\n---\r\n# Mine\r\n", "no heading"):
        (tmp_path / "README.md").write_bytes(text.encode())
        build().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == text.encode()


def test_what_cannot_be_read_hinders_nothing(tmp_path: Path) -> None:
    """Neither where a model is saved nor where it was loaded from."""
    build().save_pretrained(tmp_path / "one")
    for text in (
        b"# No metadata\n",
        b"---\nlicense: [mit\n---\n# Broken\n",
        "---\nlicense: Latin \xe9\n---\n".encode("latin1"),
    ):
        (tmp_path / "one" / "README.md").write_bytes(text)
        model = type(build()).from_pretrained(tmp_path / "one")
        with no_warnings():
            model.save_pretrained(tmp_path / "one"), model.save_pretrained(tmp_path / "two")
        assert (tmp_path / "one" / "README.md").read_bytes() == text
        assert "license" not in ModelCard(card_of(tmp_path / "two")).data.to_dict()


def test_what_somebody_edited_stays_and_the_rest_is_renewed(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    whole = card_of(tmp_path)
    build().save_pretrained(tmp_path)
    assert card_of(tmp_path) == whole
    (tmp_path / "README.md").write_bytes(whole.replace("\n", "  \r\n").encode())  # as some editors save it
    build(num_hidden_layers=1, attention_window=4).save_pretrained(tmp_path)
    renewed = card_of(tmp_path)
    assert "| `num_hidden_layers` | `1` | `12` |" in renewed and "\r" not in renewed
    # A part, a sentence of one's own between parts, and a part that was taken out.
    edit(tmp_path, "- Data: not recorded", "- Data: my letters")
    edit(tmp_path, "## Options", "Look at this.\n\n## Options")
    text = edit(
        tmp_path, "<!-- /hf_efficient_attn:training -->", "<!-- /hf_efficient_attn:training -->\n\nMy own words."
    )
    start, end = text.index("<!-- hf_efficient_attn:versions"), text.index("<!-- /hf_efficient_attn:versions -->")
    (tmp_path / "README.md").write_text(text[:start] + text[end:].partition("\n")[2])
    build(num_hidden_layers=3, attention_window=4).save_pretrained(tmp_path, card={"license": "mit", "datasets": "x"})
    text = card_of(tmp_path)
    assert "- Data: my letters\n" in text and "Look at this." in text and "\nMy own words.\n" in text
    assert "`num_hidden_layers` | `1`" in text  # in the part that was edited
    assert "## Versions" not in text and ModelCard(text).data.license == "mit"
    # Metadata of one's own.
    edit(tmp_path, "license: mit", "license: apache-2.0")
    build().save_pretrained(tmp_path, card={"license": "mit"})
    assert ModelCard(card_of(tmp_path)).data.license == "apache-2.0"


def test_the_card_that_transformers_puts_in_place_of_none_is_replaced(tmp_path: Path) -> None:
    sentence = "This is the model card of a model. This model card has been automatically generated."
    empty = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=sentence)
    (tmp_path / "README.md").write_text(str(empty))
    build().save_pretrained(tmp_path)
    assert "## Load" in card_of(tmp_path) and "More Information" not in card_of(tmp_path)
    edited = str(empty).replace("[More Information Needed]", "Me", 1)
    (tmp_path / "README.md").write_text(edited)
    build().save_pretrained(tmp_path)
    assert card_of(tmp_path) == edited


def trainer_of(model: Any, folder: Path, cls: type = Trainer, **options: Any) -> Trainer:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4, "labels": [0, 1, 0, 1]})
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        **options,
    )
    return cls(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[ModelCardCallback()])


def test_a_trainers_card_gets_what_it_lacks(tmp_path: Path) -> None:
    model = build()
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    trainer.save_model()
    ours = card_of(tmp_path / "run")
    assert re.search(r"^\| loss \| [\d.]+ \|$", ours, re.M)  # the callback has seen the evaluation
    assert "## Load" in card_of(tmp_path / "run" / "checkpoint-2")
    trainer.create_model_card(model_name="mine")
    theirs = card_of(tmp_path / "run")
    assert "## Load" not in theirs
    body = ModelCard(theirs).text.rstrip("\n")
    model.write_card(tmp_path / "run")
    both = card_of(tmp_path / "run")
    assert ModelCard(both).text.startswith(body) and "## Load" in both and "## Training\n" not in both
    assert ModelCard(both).data.tags == ["generated_from_trainer", "hf_efficient_attn", "eff_longformer"]
    trainer.save_model()
    assert card_of(tmp_path / "run") == both
    model.config.attention_window = 2
    trainer.save_model(), model.save_pretrained(tmp_path / "run", self_contained=True)
    text = card_of(tmp_path / "run")
    assert ModelCard(text).text.startswith(body) and "| `attention_window` | `2` |" in text and "sha256" in text


def test_the_best_checkpoints_figures_are_the_cards(tmp_path: Path) -> None:
    model = build()
    trainer = trainer_of(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=5.0
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[0] < losses[1] and model.card_data["metrics"]["eval_loss"] == losses[0]


def joint_model() -> EffElectraForJointPreTraining:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "embedding_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = EffElectraConfig(**sizes, intermediate_size=16)
    return EffElectraForJointPreTraining(EffElectraJointConfig(generator=encoder, discriminator=encoder))


def test_joint_models_and_their_parts_have_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    joint = joint_model()
    joint.save_pretrained("joint"), joint.save_generator("generator"), joint.save_discriminator("own")
    joint.save_discriminator("stock", stock=True)
    expected = {"joint": type(joint), "generator": type(joint.generator), "own": type(joint.discriminator)}
    for name, cls in {**expected, "stock": transformers.ElectraForPreTraining}.items():
        found: dict[str, Any] = {}
        (snippet,) = python_of(card_of(tmp_path / name))
        exec("\n".join(line for line in snippet.splitlines() if not line.startswith("tokenizer =")), found)
        assert type(found["model"]) is cls
    text = card_of(tmp_path / "stock")
    assert "pip install" not in text and ModelCard(text).data.tags == ["electra", "hf_efficient_attn", "eff_electra"]


def test_an_electra_trainers_own_card_has_both(tmp_path: Path) -> None:
    joint = joint_model()
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4, "labels": [[5, -100, 7, -100]] * 4})
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", report_to=[], use_cpu=True)
    trainer = ElectraTrainer(joint, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(), trainer.create_model_card()
    text = card_of(tmp_path)
    assert "### Training hyperparameters" in text and "AutoModelForPreTraining.from_pretrained" in text


def test_other_processes_and_adapters_write_no_card(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second" / "README.md").exists()
    model = build()
    assert hf_efficient_attn.hub.publishing.Folder.of(tmp_path, model.config) is None
