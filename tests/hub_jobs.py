"""What the processes of test_hub_push.py do: push, load what is there, and push to a Hub that fails.

`python hub_jobs.py push|reload|fail URL FOLDER`. Many checks share a process, whose start takes longer than they do:
each is a block of `checked`, and FOLDER/<job>.json says of every one how it failed, or None.
"""

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import mask_of, model_class, random_ids, random_images, randomise_, tiny_config, tiny_tokenizer
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import _http
from loopback_hub import fault, faults_left
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from hf_efficient_attn import FAMILIES
from hf_efficient_attn.auto import VISION_FAMILIES


TASKS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
}
MODELS = [(family, auto) for family, row in FAMILIES.items() for auto in TASKS if auto in row.heads]
ONE = ("eff_longformer", "AutoModelForMaskedLM")  # where one model does for all
WORDS = len(tiny_tokenizer())
IMAGE = {"height": 16, "width": 12}

results: dict[str, str | None] = {}


@contextmanager
def checked(name: str) -> Iterator[None]:
    """Write down how the block failed, and go on."""
    assert name not in results, name
    try:
        yield
        results[name] = None
    except (Exception, pytest.fail.Exception):
        results[name] = traceback.format_exc()


def build(family: str, auto: str, seed: int = 0) -> PreTrainedModel:
    vocabulary = {} if family in VISION_FAMILIES else {"vocab_size": WORDS}
    return randomise_(model_class(family, auto)(tiny_config(family, **vocabulary)), seed=seed)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Its logits of a padded batch, or of two images."""
    if model.config.model_type in VISION_FAMILIES:
        return model(pixel_values=random_images(2)).logits
    keep = mask_of([20, 33], 33)
    return torch.where(keep.bool()[..., None], model(random_ids(2, 33), attention_mask=keep).logits, 0.0)


def same(model: PreTrainedModel, expected: Tensor) -> None:
    """The model computes what was pushed. Equal weights in other memory may round differently."""
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-6)


def repo_of(family: str, auto: str) -> str:
    return f"ada/{family}-{TASKS[auto]}"


def trainer_of(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    tokenizer = tiny_tokenizer()
    data = Dataset.from_dict({"input_ids": random_ids(8, 20).tolist()})
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    return Trainer(model, arguments, train_dataset=data, data_collator=collator, processing_class=tokenizer)


def push(url: str, folder: Path) -> None:
    """With a token: one repository for every family and head, and the other ways to push."""
    api, expected, commits = HfApi(), {}, {}

    for family, auto in MODELS:
        repo = repo_of(family, auto)
        with checked(f"push {repo}"):
            model = build(family, auto)
            model.push_to_hub(repo)
            words = ViTImageProcessorPil(size=IMAGE) if family in VISION_FAMILIES else tiny_tokenizer()
            words.push_to_hub(repo)
            expected[repo] = logits_of(model)
            assert {"README.md", "config.json", "model.safetensors"} <= set(api.list_repo_files(repo))
            assert ModelCard.load(repo).data.library_name == "transformers"

    with checked("create a repository"):
        assert api.create_repo("ada/by-hand").repo_id == "ada/by-hand"
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_repo("ada/by-hand")
        api.create_repo("ada/by-hand", exist_ok=True)
    with checked("a foreign name"), pytest.raises(HfHubHTTPError, match="403"):
        build(*ONE).push_to_hub("bob/mine")

    with checked("push Trainer.push_to_hub"):
        trainer = trainer_of(build(*ONE), folder / "trained", hub_model_id="ada/trained")
        trainer.train()
        trainer.push_to_hub()
        theirs = ModelCard.load("ada/trained").text.rstrip("\n")
        assert "## Load\n" not in theirs
        trainer.model.push_to_hub("ada/trained")
        both = ModelCard.load("ada/trained").text
        assert both.startswith(theirs) and '.from_pretrained("ada/trained")' in both
        expected["ada/trained"] = logits_of(trainer.model.eval())
    with checked("push every_save"):
        saving = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 1}
        trainer = trainer_of(build(*ONE), folder / "every", hub_model_id="ada/every", hub_always_push=True, **saving)
        trainer.train()
        expected["ada/every"] = logits_of(trainer.model.eval())

    with checked("push private"):
        model = build(*ONE, seed=1)
        model.push_to_hub("ada/secret", private=True)
        expected["ada/secret"] = logits_of(model)
    with checked("push again keeps what is known"):
        known = {"license": "mit", "metrics": {"f1": 0.5}, "summary": "Mine."}
        build(*ONE).push_to_hub("ada/known", card=known)
        model = transformers.AutoModelForMaskedLM.from_pretrained("ada/known")
        for _ in range(2):
            model.push_to_hub("ada/known", revision="more")  # a branch that is not there, and one that is
            card = ModelCard(Path(hf_hub_download("ada/known", "README.md", revision="more")).read_text())
            assert card.data.license == "mit" and "| f1 | 0.5 |" in card.text and "Mine." in card.text
            assert "- Base model: not recorded" in card.text
    with checked("push revisions"):
        for seed in range(3):
            model = build(*ONE, seed=seed)
            commits[seed] = model.push_to_hub("ada/twice", revision="trial" if seed == 2 else None).oid
            expected[f"ada/twice {seed}"] = logits_of(model)
    torch.save((expected, commits), folder / "expected.pt")


def reload(url: str, folder: Path) -> None:
    """Without a token, in a process that has only imported the package: what `push` left there."""
    expected, commits = torch.load(folder / "expected.pt")
    masked_lm = transformers.AutoModelForMaskedLM.from_pretrained

    for family, auto in MODELS:
        repo = repo_of(family, auto)
        with checked(f"reload {repo}"):
            model = getattr(transformers, auto).from_pretrained(repo)
            assert type(model) is model_class(family, auto)
            same(model, expected[repo])
        with checked(f"pipeline {repo}"):
            if family in VISION_FAMILIES:
                from PIL import Image

                # Given, because versions without torchvision do not find its PIL form themselves.
                processor = ViTImageProcessorPil.from_pretrained(repo)
                pipe = pipeline(TASKS[auto], model=repo, image_processor=processor)
                assert len(pipe(Image.new("RGB", (20, 30)))) > 0
            else:
                pipe = pipeline(TASKS[auto], model=repo)
                options = {"max_new_tokens": 2} if TASKS[auto] == "text-generation" else {}
                assert len(pipe("the quick <mask> fox", **options)) > 0
            assert type(pipe.model) is model_class(family, auto)

    for repo in ("ada/trained", "ada/every"):
        with checked(f"reload {repo}"):
            same(masked_lm(repo), expected[repo])
            assert (
                transformers.AutoTokenizer.from_pretrained(repo)("the fox").input_ids
                == tiny_tokenizer()("the fox").input_ids
            )

    for token, status in ((None, 401), ("hf_bob", 404)):
        with checked(f"private, token {token}"):
            with pytest.raises(OSError, match="ada/secret"):
                masked_lm("ada/secret", token=token)
            with pytest.raises(RepositoryNotFoundError) as error:
                HfApi(token=token).model_info("ada/secret")
            assert error.value.response.status_code == status
    with checked("private, with its owner's token"):
        same(masked_lm("ada/secret", token="hf_ada"), expected["ada/secret"])

    for seed, revision in ((0, commits[0]), (1, commits[1]), (1, "main"), (2, "trial")):
        with checked(f"revision {seed} {revision}"):
            same(masked_lm("ada/twice", revision=revision), expected[f"ada/twice {seed}"])
    with checked("no such revision"), pytest.raises(OSError, match="nowhere"):
        masked_lm("ada/twice", revision="nowhere")


def fail(url: str, folder: Path) -> None:
    """With a token: single calls that fail, then all uploads, then the commit."""
    # The client waits 1, 2, 4, 8 and 8 seconds between its tries.
    _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    api = HfApi()

    def there(repo: str) -> PreTrainedModel:
        """What somebody gets by the name, who has nothing of it in a cache."""
        return transformers.AutoModelForMaskedLM.from_pretrained(
            repo, cache_dir=folder / f"cache-{time.monotonic_ns()}"
        )

    for step in ("preupload", "batch", "upload", "verify"):
        with checked(f"one 500 in {step}"):
            model = build(*ONE)
            fault(url, step, 1)
            model.push_to_hub(f"ada/one-{step}")
            assert faults_left(url)[step] == 0
            same(there(f"ada/one-{step}"), logits_of(model))

    local = folder / "local"
    build(*ONE, seed=2).save_pretrained(local)
    tiny_tokenizer().save_pretrained(local)
    model, old = transformers.AutoModelForMaskedLM.from_pretrained(local), build(*ONE, seed=1)
    new = logits_of(model)
    for step in ("upload", "commit"):
        with checked(f"every {step} fails, nothing there"):
            repo = f"ada/no-{step}"
            fault(url, step)
            with refused(step):
                model.push_to_hub(repo)
            assert api.list_repo_files(repo) == [".gitattributes"]
            with pytest.raises((OSError, ValueError), match=repo):
                there(repo)
            fault(url, step, 0)
            model.push_to_hub(repo)
            same(there(repo), new)

        for way in ("model", "folder", "Trainer"):
            with checked(f"every {step} fails, {way}, something there"):
                repo, place = f"ada/no-{step}-{way}", folder / f"trainer-{step}-{way}"
                fault(url, step, 0)
                old.push_to_hub(repo)
                trainer = trainer_of(model, place, hub_model_id=repo)
                trainer.save_model()
                # With the tags that its push gives it.
                trainer.create_model_card(model_name=repo.split("/")[1], tags=list(model.model_tags))
                ways = {
                    "model": lambda repo=repo: model.push_to_hub(repo),
                    "folder": lambda repo=repo: api.upload_folder(repo_id=repo, folder_path=local),
                    "Trainer": trainer.push_to_hub,
                }
                before = hashes(local), hashes(place), api.list_repo_files(repo), api.model_info(repo).sha
                fault(url, step)
                with refused(step):
                    ways[way]()
                after = hashes(local), hashes(place), api.list_repo_files(repo), api.model_info(repo).sha
                assert after == before
                same(there(repo), logits_of(old))
                fault(url, step, 0)
                ways[way]()
                same(there(repo), new)

        # transformers pushes checkpoints in the background and is silent about those that fail; the next push says it.
        with checked(f"every {step} fails, every_save"):
            repo = f"ada/no-{step}-saves"
            fault(url, step, 0)
            old.push_to_hub(repo)
            saving = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 1}
            trainer = trainer_of(build(*ONE, seed=3), folder / f"saves-{step}", hub_model_id=repo, **saving)
            fault(url, step)
            trainer.train()
            with refused(step):
                trainer.push_to_hub()
            same(there(repo), logits_of(old))
            fault(url, step, 0)
            trainer.push_to_hub()
            same(there(repo), logits_of(trainer.model.eval()))
        fault(url, step, 0)


@contextmanager
def refused(step: str) -> Iterator[None]:
    """The block raises, and the error says what the Hub answered, itself or by what caused it."""
    with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:
        yield
    errors = [caught.value]
    while errors[-1].__cause__ is not None:
        errors.append(errors[-1].__cause__)
    answers = [str(error) for error in errors if isinstance(error, HfHubHTTPError)]
    assert any("500" in answer and f"loopback fault in {step}" in answer for answer in answers), errors


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    job, address, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    {"push": push, "reload": reload, "fail": fail}[job](address, place)
    (place / f"{job}.json").write_text(json.dumps(results), encoding="utf-8")
