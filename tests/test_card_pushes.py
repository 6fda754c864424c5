"""Cards and code on the Hub: what a push uploads, and what happens to what is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from card_cases import FakeHub, build, card_of, edit
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from typer.testing import CliRunner

from hf_efficient_attn.cli import app
from hf_efficient_attn.hub import pushing
from hf_efficient_attn.hub.exporting import push_folder


def test_a_push_uploads_the_card_with_the_repositorys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, None)
    model = build()
    model.push_to_hub("mine", private=True, revision="try", tags="extra", card={"license": "mit"})
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


KNOWN = {
    "datasets": "stanfordnlp/imdb",
    "metrics": {"accuracy": 0.9},
    "license": "mit",
    "tags": "reviews",
    "summary": "It reads film reviews.",
}


def assert_known(text: str, figures: bool = True) -> None:
    data = ModelCard(text).data
    assert data.license == "mit" and "reviews" in data.tags and "\nIt reads film reviews.\n" in text
    assert data.datasets == ["stanfordnlp/imdb"] and ("| accuracy | 0.9 |" in text) is figures
    assert (data.eval_results is not None) is figures


def test_what_the_repositorys_card_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, None)
    model = build()
    model.push_to_hub("mine", card=KNOWN)
    hub.card = hub.files["README.md"].decode()
    model.card_data = None  # as when it is loaded from there
    for edited in (False, True):
        if edited:
            hub.card += "\n## Notes\n\nBy hand.\n"
        for is_saved in (False, True):
            model.save_pretrained(tmp_path / "mine", push_to_hub=True) if is_saved else model.push_to_hub("mine")
            assert_known(hub.files["README.md"].decode())
            assert ("By hand." in hub.files["README.md"].decode()) is edited
    with torch.no_grad():
        model.classifier.out_proj.bias.add_(1)
    model.push_to_hub("mine")
    assert_known(hub.files["README.md"].decode(), figures=False)


def test_a_new_branch_keeps_the_main_ones_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, "# By hand\n")
    hub.missing = ("dev",)
    build().push_to_hub("mine", revision="dev")
    assert ("create_branch", "dev") in hub.calls and hub.files["README.md"].decode() == "# By hand\n"


def test_an_exported_folders_card_is_the_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path, None)
    folder = tmp_path / "local-folder"
    build().save_pretrained(folder, card=KNOWN)
    state = ("global_step5/x.pt", "optimizer_0/x.pt", "checkpoint-3/config.json", "runs/x", ".cache/x", "optimizer.bin")
    state += (
        "optimizer.pt",
        "random_states_0.pkl",
        "rng_state_1.pth",
        "scheduler.pt",
        "trainer_state.json",
        "_mine.txt",
    )
    for name in (*state, "runs.md", "onnx/model.onnx", "optimizers.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    result = CliRunner().invoke(app, ["export", str(folder), "--push-to", "you/imdb"])
    assert result.exit_code == 0 and "hub   done" in result.output, result.output
    model = {"README.md", "config.json", "model.safetensors", "modeling_eff_longformer.py"}
    assert hub.files.keys() == {*model, "runs.md", "onnx/model.onnx", "optimizers.md"}
    text = hub.files["README.md"].decode()
    assert "local-folder" not in text and "# imdb\n" in text and text.count('"you/imdb"') == 3
    assert ModelCard(text).data.model_name == "imdb"
    assert_known(text)
    # Over a card that was edited there, and with metadata that were edited here.
    hub.card = text + "\nBy hand.\n"
    edit(folder, "license: mit", "license: mit\nthumbnail: x")
    push_folder(folder, "you/imdb")
    assert "\nBy hand.\n" in hub.files["README.md"].decode()
    assert_known(hub.files["README.md"].decode())
    hub.card = None
    push_folder(folder, "you/imdb")
    data = ModelCard(hub.files["README.md"].decode()).data
    assert (data.model_name, data.get("thumbnail")) == ("imdb", "x") and "local-folder" in card_of(folder)


@pytest.mark.parametrize("error", [HTTPError("refused\nby the Hub"), OfflineModeIsEnabled("refused by the Hub")])
def test_a_hub_that_refuses_an_export_gives_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(monkeypatch, tmp_path, None)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "create_commit", refuse)
    build().save_pretrained(tmp_path / "mine")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "mine"), "--push-to", "you/imdb"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "refused by the Hub" in result.stderr
