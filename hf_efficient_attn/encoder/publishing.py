"""Saving, with a place for what the package adds to a folder: its card, and code that comes with it.

The frame knows neither. `Published.publisher` is set from outside when the package registers its models, and is None in
code that came with a checkpoint and runs without the package: there saving is transformers' own.
"""

import os
from collections.abc import Callable
from typing import Any, ClassVar, Protocol


PACKAGE = "hf_efficient_attn"


class Publisher(Protocol):
    """What adds to saved folders; `hf_efficient_attn.hub.publishing` has it."""

    def save_config(self, config: Any, plainly: Callable[..., Any], folder: str | os.PathLike, **kwargs: Any) -> None:
        """Called for `config.save_pretrained`; `plainly` is transformers' own."""

    def save_model(self, model: Any, plainly: Callable[..., Any], folder: str | os.PathLike, **kwargs: Any) -> None:
        """Called for `model.save_pretrained`."""

    def push_model(self, model: Any, repo_id: str, **kwargs: Any) -> Any:
        """Called for `model.push_to_hub`."""

    def write_card(self, model: Any, folder: str | os.PathLike, card: dict[str, Any] | None) -> None:
        """Called for `model.write_card`."""

    def check_card(self, card: dict[str, Any] | None) -> None:
        """Raises `ValueError` for what no `card_data` can be."""


class Published:
    """What models and configs share."""

    publisher: ClassVar[Publisher | None] = None

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """As in transformers for code that came with a folder, and for subclasses of yours.

        Nothing for the package's own classes: their modules make no file that could be saved alone. To save the code
        with a model there is `save_pretrained(folder, self_contained=True)`.
        """
        if cls.__module__.partition(".")[0] != PACKAGE:
            super().register_for_auto_class(*args, **kwargs)


class PublishedConfig(Published):
    """A config; mixed in before transformers' class."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers; code that the config names is written beside it."""
        plainly = super().save_pretrained
        if self.publisher is None:
            plainly(save_directory, push_to_hub=push_to_hub, **kwargs)
        else:
            self.publisher.save_config(self, plainly, save_directory, push_to_hub=push_to_hub, **kwargs)


class PublishedModel(Published):
    """A model; mixed in before transformers' class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.model_tags = [PACKAGE, config.model_type]  # Trainer's cards show them as well

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        source = pretrained_model_name_or_path
        if isinstance(source, str | os.PathLike) and os.path.isdir(source):
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            # Decided now: later the folder may be gone, or another one be current.
            model.__dict__["loaded_from_folder"] = os.path.abspath(source)
        return loaded

    @property
    def card_data(self) -> dict[str, Any] | None:
        """What only you know of a model, for its card: `base_model`, `datasets`, `metrics`, `license`, `language`,
        `tags` and `summary`, each if known. Setting another key raises `ValueError`."""
        return self.__dict__.get("_card_data")

    @card_data.setter
    def card_data(self, card: dict[str, Any] | None) -> None:
        if self.publisher is not None:
            self.publisher.check_card(card)
        self.__dict__["_card_data"] = card

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *,
        card: dict[str, Any] | None = None,
        self_contained: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers, with a model card, `README.md`.

        Args:
            save_directory: the folder.
            is_main_process, state_dict, push_to_hub, kwargs: see transformers.
            card: added to `card_data`, from here on.
            self_contained: write the model's code too, as one file, so that the folder loads with
                `trust_remote_code=True` where the package is not installed. By default as the model was loaded.

        Raises:
            ValueError: a key that cards do not have; `self_contained` for a model that has no such form.
        """
        given = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        plainly = super().save_pretrained
        if self._has_publisher(card=card, self_contained=self_contained):
            self.publisher.save_model(self, plainly, save_directory, card=card, self_contained=self_contained, **given)
        else:
            plainly(save_directory, **given)

    def push_to_hub(
        self, repo_id: str, *, card: dict[str, Any] | None = None, self_contained: bool | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers, with a model card; `card` and `self_contained` as in `save_pretrained`.

        A card that is on the Hub already and that somebody wrote or edited stays; so does one that Trainer wrote, which
        gets the lines on loading.
        """
        if self._has_publisher(card=card, self_contained=self_contained):
            return self.publisher.push_model(self, repo_id, card=card, self_contained=self_contained, **kwargs)
        return super().push_to_hub(repo_id, **kwargs)

    def write_card(self, folder: str | os.PathLike, card: dict[str, Any] | None = None) -> None:
        """Write or renew the model card of `folder`, where this model was saved; `card` as in `save_pretrained`.

        Trainer overwrites `README.md` with its own in `create_model_card` and `push_to_hub`; this adds the lines on
        loading to that one.
        """
        if self._has_publisher(write_card=folder):
            self.publisher.write_card(self, folder, card)

    def _has_publisher(self, **wanted: Any) -> bool:
        """Whether the package is there; raises `ValueError` where it is not and something of it is wanted."""
        for name, value in wanted.items():
            if self.publisher is None and value is not None:
                raise ValueError(f"{name} = {value!r} needs the package: install {PACKAGE}, and import it.")
        return self.publisher is not None
