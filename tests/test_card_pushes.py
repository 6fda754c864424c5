"""Cards and code on the Hub: what a push uploads, and what happens to what is there."""

from pathlib import Path
from typing import Any

import pytest
from card_cases import FakeHub, build, card_of
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_efficient_attn.hub import pushing


def test_a_push_uploads_the_card_with_the_repositorys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, None)
    model = build()
    assert model.push_to_hub("mine", private=True, revision="try", tags="extra", card={"license": "mit"}) == "done"
    assert hub.calls == [
        ("create_repo", True, True),
        ("create_branch", "try"),
        ("create_commit", "Upload model", "try", False),
    ]
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors"}
    text = hub.files["README.md"].decode()
    assert '.from_pretrained("me/mine")' in text and text.count("# mine\n") == 1
    data = ModelCard(text).data
    assert data.license == "mit" and data.tags == ["hf_efficient_attn", "eff_longformer", "extra"]
    # Its own card is replaced, an edited one kept, and of a foreign one nothing is touched.
    hub.card = text
    model.push_to_hub("mine", card={"license": "apache-2.0"})
    assert ModelCard(hub.files["README.md"].decode()).data.license == "apache-2.0"
    hub.card = text.replace("- Data: not recorded", "- Data: letters")
    model.push_to_hub("mine", self_contained=True)
    assert "- Data: letters" in hub.files["README.md"].decode() and "sha256" in hub.files["README.md"].decode()
    assert "modeling_eff_longformer.py" in hub.files
    hub.card = "# Somebody's\n"
    model.push_to_hub("mine")
    assert hub.files["README.md"].decode() == hub.card


def test_saving_and_pushing_at_once_uploads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not for others")
    build().save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="First", create_pr=True)
    assert hub.calls == [("create_repo", None, True), ("create_commit", "First", None, True)]
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert '.from_pretrained("me/mine")' in card_of(tmp_path / "mine")


def test_a_folder_with_code_is_pushed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file was there already, and is not written again."""
    hub = FakeHub(monkeypatch, tmp_path, None)
    model = build()
    model.save_pretrained(tmp_path / "mine", self_contained=True)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors", "modeling_eff_longformer.py"}


def test_a_configs_push_takes_its_code_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, "# Somebody's\n")
    model = build()
    model.save_pretrained(tmp_path / "mine", self_contained=True)
    model.config.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="you/config", token="t")
    assert hub.files.keys() == {"config.json", "modeling_eff_longformer.py"} and hub.repo_id == "you/config"


def test_a_network_that_fails_is_no_missing_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, None)

    def failing(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(pushing, "hf_hub_download", failing)
    with pytest.raises(LocalEntryNotFoundError):
        build().push_to_hub("mine")
    assert not hub.files
