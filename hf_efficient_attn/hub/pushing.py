"""Uploading a folder, without overwriting a card that somebody wrote."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError

from .card import Card
from .card_file import CARD_FILE, is_ours, read_card, renewed_text


def make_repo(repo_id: str, private: bool | None, token: bool | str | None) -> str:
    """Create a model repository unless it is there; its full name."""
    return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def push(
    folder: Path,
    files: Iterable[str],
    repo_id: str,
    card: Card | None,
    *,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload files of a folder in one commit.

    Args:
        folder, files: the folder, and names in it.
        repo_id: the repository.
        card: the card of what is pushed.
        token, revision, create_pr, commit_message, commit_description: see `huggingface_hub.HfApi.create_commit`; a
            branch that is not there is made.
    """
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, folder / name) for name in sorted(files) if name != CARD_FILE]
    text = _card_text(folder, card, _remote_card(repo_id, revision, token))
    if text is not None:
        operations.append(CommitOperationAdd(CARD_FILE, text.encode("utf-8", "surrogateescape")))
    if revision is not None and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # Who may not make a branch may still propose a change to one that is there.
            if not create_pr or error.response.status_code != 403:
                raise
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def times_of(folder: Path) -> dict[str, Any]:
    """File in `folder` -> what changes when it is written; folders in it are left out."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in found if path.is_file()}


def _remote_card(repo_id: str, revision: str | None, token: bool | str | None) -> str | None:
    """The card that is there; None if there is none. A failing network is an error, not a missing card."""
    try:
        path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    return read_card(Path(path))


def _card_text(folder: Path, card: Card | None, remote: str | None) -> str | None:
    """What the repository's card becomes; None to leave it as it is."""
    if card is None:
        return None
    return read_card(folder / CARD_FILE) if remote is None or is_ours(remote) else renewed_text(remote, card)
