"""The snippets of README.md and the model cards run as they stand, with a local folder for the name on the Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import randomise_, tiny_tokenizer
from transformers import (
    BertForMaskedLM,
    BigBirdForMaskedLM,
    ElectraForPreTraining,
    LongformerForMaskedLM,
    LongformerForQuestionAnswering,
    NystromformerForMaskedLM,
    ReformerModelWithLMHead,
    ViTConfig,
    ViTForImageClassification,
)


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))]
SNIPPETS = [
    (page.name, number, code)
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


# Name on the Hub -> transformers' own class, and what its config has besides the shared fields.
LONGFORMER = {"attention_window": 16, "max_position_embeddings": 4098, "type_vocab_size": 1}
CHECKPOINTS = {
    "allenai/longformer-base-4096": (LongformerForMaskedLM, LONGFORMER),
    "allenai/longformer-large-4096-finetuned-triviaqa": (LongformerForQuestionAnswering, LONGFORMER),
    "google/electra-small-discriminator": (ElectraForPreTraining, {"embedding_size": 8}),
    "google/bigbird-roberta-base": (BigBirdForMaskedLM, {"sep_token_id": 2}),
    "google-bert/bert-base-uncased": (BertForMaskedLM, {}),
    "google/reformer-enwik8": (
        ReformerModelWithLMHead,
        {"attn_layers": ["lsh"], "is_decoder": True, "axial_pos_embds_dim": [8, 8]},
    ),
    "uw-madison/nystromformer-512": (NystromformerForMaskedLM, {}),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What published checkpoints look like: transformers' own classes, Longformer's table for 4,096 tokens."""
    tmp_path = tmp_path_factory.mktemp("published")
    tokenizer = tiny_tokenizer(max_length=4096)
    folders = {name: tmp_path / model.__name__ for name, (model, _) in CHECKPOINTS.items()}
    for name, folder in folders.items():
        model, fields = CHECKPOINTS[name]
        config = model.config_class(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            pad_token_id=1,
            **fields,
        )
        randomise_(model(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    folders["google/vit-base-patch16-224"] = tmp_path / "ViT"
    # Published images are of 224 pixels; the patches are larger here, so that there are few.
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=56)
    randomise_(ViTForImageClassification(vit)).save_pretrained(folders["google/vit-base-patch16-224"])
    return folders


def test_there_are_snippets() -> None:
    assert {name for name, _, _ in SNIPPETS} == {page.name for page in PAGES}


@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=[f"{page}-{number}" for page, number, _ in SNIPPETS])
def test_snippet_runs(page: str, number: int, code: str, published: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in published.items():
        code = code.replace(name, str(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if "save_model" in code:
        assert (tmp_path / "my-classifier" / "model.safetensors").is_file()


def test_readme_is_linked_to_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
