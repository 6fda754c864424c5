"""Uploading a folder, without overwriting a card that somebody wrote."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError

from .card import Card
from .card_file import CARD_FILE, is_ours, read_card, renewed_text
from .inheriting import Earlier, said_by


def make_repo(repo_id: str, private: bool | None, token: bool | str | None) -> str:
    """Create a model repository unless it is there; its full name."""
    return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


@dataclass(frozen=True)
class Remote:
    """What a repository has before a push.

    Args:
        repo_id: the repository.
        token, revision: see `push`.
    """

    repo_id: str
    token: bool | str | None = None
    revision: str | None = None

    @cached_property
    def card(self) -> str | None:
        """Its card; None if there is none. A failing network is an error, not a missing card."""
        try:
            return self._card(self.revision)
        except RevisionNotFoundError:  # a branch that the push makes, of the main one
            return self._card(None)

    def earlier(self) -> Earlier:
        """What its card says."""
        known = said_by(self.card)
        return Earlier(known, self._weights() if "metrics" in known else {})

    def text_for(self, local: str | None, card: Card | None) -> str | None:
        """What its card becomes where `local` is the pushed folder's; None to leave it as it is."""
        if card is None:
            return None
        return local if self.card is None or is_ours(self.card) else renewed_text(self.card, card)

    def _card(self, revision: str | None) -> str | None:
        try:
            path = hf_hub_download(self.repo_id, CARD_FILE, revision=revision, token=self.token)
        except RemoteEntryNotFoundError:
            return None
        return read_card(Path(path))

    def _weights(self) -> dict[str, str]:
        api = HfApi(token=self.token)
        try:
            files = list(api.list_repo_tree(self.repo_id, revision=self.revision))
        except RevisionNotFoundError:
            files = list(api.list_repo_tree(self.repo_id))
        large = {file.path: file.lfs for file in files if getattr(file, "lfs", None) is not None}
        return {name: lfs.sha256 for name, lfs in sorted(large.items()) if name.endswith(".safetensors")}


def push(
    folder: Path,
    files: Iterable[str],
    repo_id: str,
    text: str | None,
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
        text: the card, or None to leave the one there as it is.
        token, revision, create_pr, commit_message, commit_description: see `huggingface_hub.HfApi.create_commit`; a
            branch that is not there is made.
    """
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, folder / name) for name in sorted(files) if name != CARD_FILE]
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
