"""Tiny models, what their cards say, and a Hub that notes what it is asked, for the tests of cards."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import model_class, tiny_config
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

from hf_efficient_attn.hub import pushing


def build(family: str = "eff_longformer", auto: str = "AutoModelForSequenceClassification", **options: Any) -> Any:
    """A tiny model."""
    if auto == "AutoModelForCausalLM":
        options["is_decoder"] = True
    return model_class(family, auto)(tiny_config(family, **options))


def card_of(folder: Path) -> str:
    """The card's text."""
    return (folder / "README.md").read_text(encoding="utf-8")


def edit(folder: Path, old: str, new: str) -> str:
    """Replaces `old` in the card; the text after."""
    text = card_of(folder)
    assert text.count(old) == 1, text
    (folder / "README.md").write_text(text.replace(old, new), encoding="utf-8")
    return card_of(folder)


def python_of(text: str) -> list[str]:
    """The Python snippets of a card."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class FakeHub:
    """What `push` asks of the Hub: a repository with a card, or none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: str | None) -> None:
        self.calls: list[tuple] = []
        self.files: dict[str, bytes] = {}
        self.path, self.card = tmp_path / "remote.md", card
        self.missing: tuple[str, ...] = ()
        monkeypatch.setattr(pushing, "HfApi", lambda token=None: self)
        monkeypatch.setattr(pushing, "hf_hub_download", self.download)

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        self.calls.append(("create_repo", private, exist_ok))
        self.repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        return self

    def download(self, repo_id: str, name: str, revision: str | None, token: str | None) -> str:
        assert (repo_id, name) == (self.repo_id, "README.md")
        if revision in self.missing:
            raise RevisionNotFoundError("no such branch", response=FakeResponse())
        if self.card is None:
            raise RemoteEntryNotFoundError("none", response=FakeResponse())
        self.path.write_text(self.card)
        return str(self.path)

    def list_repo_tree(self, repo_id: str, revision: str | None = None) -> Iterator[Any]:
        """What the last push uploaded."""
        for name, content in self.files.items():
            lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest())
            yield SimpleNamespace(path=name, lfs=lfs if name.endswith(".safetensors") else None)

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.calls.append(("create_branch", branch))

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **kwargs: Any) -> str:
        self.files = {}
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        self.calls.append(("create_commit", kwargs["commit_message"], kwargs["revision"], kwargs["create_pr"]))
        return SimpleNamespace(commit_url="done")


class FakeResponse:
    headers: dict[str, str] = {}
    request = None
    status_code = 404
