"""What `save_pretrained` and `push_to_hub` of the package's models do besides saving."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo

from ..auto import FAMILIES
from ..encoder.publishing import Published
from .card import Card, make_card
from .card_file import CARD_FILE, new_text, read_card, renewed_text
from .code_file import auto_map_of, class_names, code_of, names_our_code, remove_code, write_code
from .facts import Folder, Known, hub_source, is_of_package, listed
from .files import write_whole
from .inheriting import Earlier, merged, said_by, weights_of
from .pushing import Remote, make_repo, push, times_of


# Of `save_pretrained(..., push_to_hub=True)`: what is for the Hub.
_FOR_THE_HUB = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision")


def attach() -> None:
    """Have models and configs of the package saved with what this room adds."""
    Published.publisher = HubPublisher()


class HubPublisher:
    """The `Publisher` of the package."""

    def save_config(
        self,
        config: Any,
        plainly: Callable[..., Any],
        folder: str | os.PathLike,
        *,
        push_to_hub: bool,
        **kwargs: Any,
    ) -> None:
        """Save a config, and the code that it names."""
        if not names_our_code(config):
            plainly(folder, push_to_hub=push_to_hub, **kwargs)
            return
        hub = _for_the_hub(kwargs) if push_to_hub else {}
        # As it is now: the config may have been loaded from a repository, or from another version's folder.
        code = write_code(Path(folder), config.model_type)
        config.auto_map = {**config.auto_map, **code.auto_map}
        plainly(folder, **kwargs)
        if push_to_hub:
            repo_id = _repo_of(Path(folder), hub)
            push(Path(folder), ["config.json", code.name], repo_id, None, **hub)

    def save_model(
        self,
        model: Any,
        plainly: Callable[..., Any],
        folder: str | os.PathLike,
        *,
        card: dict[str, Any] | None,
        self_contained: bool | None,
        push_to_hub: bool,
        **kwargs: Any,
    ) -> None:
        """Save a model with its card, and push what was written if asked to."""
        is_without_code = _take_down(model, card, self_contained)
        hub = _for_the_hub(kwargs) if push_to_hub else {}
        path, saves_here = Path(folder), _saves_here(model, kwargs["is_main_process"])
        repo_id = _repo_of(path, hub) if push_to_hub and saves_here else None
        before, earlier = times_of(path), [_earlier(model)] if saves_here else []
        plainly(folder, push_to_hub=False, **kwargs)
        if not saves_here:
            return
        if is_without_code:
            remove_code(path, model.config.model_type)
        remote = None if repo_id is None else Remote(repo_id, hub["token"], hub.get("revision"))
        fresh = _card_of(model, path, repo_id, _with_remote(earlier, remote, model))
        if fresh is not None:
            write_card_file(path, fresh)
        if repo_id is not None:
            changed = {name for name, time in times_of(path).items() if before.get(name) != time}
            if names_our_code(model.config):  # which is not written again where it is the same
                changed.add(code_of(model.config.model_type).name)
            push(path, changed, repo_id, remote.text_for(read_card(path / CARD_FILE), fresh), **hub)

    def push_model(
        self,
        model: Any,
        repo_id: str,
        *,
        card: dict[str, Any] | None,
        self_contained: bool | None,
        private: bool | None = None,
        token: bool | str | None = None,
        max_shard_size: int | str = "50GB",
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Save a model into a folder that goes away, and push that."""
        _take_down(model, card, self_contained)
        model.add_model_tags(listed(tags))
        repo_id = make_repo(repo_id, private, token)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            remote = Remote(repo_id, token, kwargs.get("revision"))
            fresh = _card_of(model, Path(folder), repo_id, _with_remote([_earlier(model)], remote, model))
            text = None if fresh is None else remote.text_for(new_text(fresh), fresh)
            return push(Path(folder), list(times_of(Path(folder))), repo_id, text, token=token, **kwargs)

    def check_card(self, card: dict[str, Any] | None) -> None:
        """Raises `ValueError` for a key that cards do not have, or a value that none can be."""
        Known.of(card)

    def write_card(self, model: Any, folder: str | os.PathLike, card: dict[str, Any] | None) -> None:
        """Write or renew the card of a folder in which the model was saved."""
        _take_down(model, card, None)
        fresh = _card_of(model, Path(folder), None, [_earlier(model)])
        if fresh is None:
            raise ValueError(
                f"there is no config.json of a family of the package in {os.fspath(folder)!r}; save such a model there "
                "first."
            )
        write_card_file(Path(folder), fresh)


def write_card_file(folder: Path, card: Card, parts: tuple[str, ...] | None = None) -> None:
    """Write or renew the card in `folder`, only its `parts` where it is one of the package already."""
    path = folder / CARD_FILE
    write_whole(path, renewed_text(read_card(path), card, parts))


def _for_the_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `kwargs` what is for the Hub; the token is for both."""
    taken = {name: kwargs.pop(name) for name in _FOR_THE_HUB if name in kwargs}
    return {**taken, "token": kwargs.get("token")}


def _repo_of(folder: Path, hub: dict[str, Any]) -> str:
    """The repository that a folder is pushed to, made unless it is there."""
    return make_repo(hub.pop("repo_id", folder.resolve().name), hub.pop("private", None), hub["token"])


def _take_down(model: Any, card: dict[str, Any] | None, self_contained: bool | None) -> bool:
    """Notes on the model what a call says; raises `ValueError` before anything is changed.

    Returns:
        Whether the code goes that was there.
    """
    known = {**(model.card_data or {}), **(card or {})}
    Known.of(known)
    config = model.config
    # The code that a model was loaded with does not hold a class that somebody derived from it.
    is_derived = self_contained is None and names_our_code(config) and not is_of_package(type(model))
    is_without_code = self_contained is False or is_derived
    if self_contained:
        auto_map = code_of(config.model_type).auto_map
        name = type(model).__name__.removeprefix("FSDP")
        if name not in class_names(FAMILIES[config.model_type]):
            raise ValueError(
                f"self_contained = True for a {name}, which is no class of the package: its own code would be missing. "
                f"Leave it out, or save an instance of {', '.join(class_names(FAMILIES[config.model_type])[2:4])}, ..."
            )
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), **auto_map}
    elif is_without_code and names_our_code(config):
        ours = auto_map_of(FAMILIES[config.model_type])
        config.auto_map = {auto: name for auto, name in config.auto_map.items() if auto not in ours}
        if not config.auto_map:
            del config.auto_map
    if known:
        model.card_data = known
    return is_without_code


def _earlier(model: Any) -> Earlier:
    """The card of the folder that a model was loaded from; asked before it is saved, which may be there."""
    folder = getattr(model, "loaded_from_folder", None) or getattr(model.config, "_name_or_path", "")
    if not folder:
        return Earlier()
    path = Path(folder)
    known = said_by(read_card(path / CARD_FILE))
    if "metrics" in (model.card_data or {}):
        known.pop("metrics", None)
    return Earlier(known, weights_of(path) if "metrics" in known else {})


def _with_remote(earlier: list[Earlier], remote: Remote | None, model: Any) -> list[Earlier]:
    """Earlier cards with the one of the repository that is pushed to before them."""
    if remote is None:
        return earlier
    there = remote.earlier()
    if hub_source(model) not in ("", remote.repo_id):  # it started elsewhere
        there = Earlier({name: value for name, value in there.known.items() if name != "base_model"}, there.weights)
    return [there, *earlier]


def _card_of(model: Any, path: Path, repo_id: str | None, earlier: list[Earlier]) -> Card | None:
    """The card of a model that was saved at `path`; None where there can be none, see `Folder.of`."""
    folder = Folder.of(path, model.config, model)
    if folder is None:
        return None
    known = Known.of(merged(*(card.true_of(path) for card in earlier), model.card_data or {}))
    known = known.with_tags(model.model_tags)
    code = code_of(model.config.model_type) if names_our_code(model.config) and not folder.is_stock else None
    name = path.resolve().name if repo_id is None else repo_id.rpartition("/")[2]
    return make_card(folder, known, name=name, repo_id=repo_id, code=code)


def _saves_here(model: Any, is_main_process: bool) -> bool:
    """Whether this process is the one that writes."""
    decide = getattr(model, "should_save_on_this_rank", None)
    return is_main_process if decide is None else decide(is_main_process)
