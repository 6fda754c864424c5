"""README.md as a file that two write: the package its parts, users anything. What a user wrote or changed stays.

Each part of ours stands between two comments, which the Hub does not show. The first one has a hash of what is between
them: where it fits no more, somebody has edited the part, and it is left alone from then on.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

from .card import Card
from .facts import PACKAGE


CARD_FILE = "README.md"

# What somebody who deletes a part wants gone; these come and go with what is in the folder.
_COMES_AND_GOES = ("code",)

# What Trainer writes above its cards.
_TRAINER = "This model card has been generated automatically according to the information the Trainer had access to."

# The parts that Trainer's card does not have itself.
_BESIDE_TRAINER = ("loading", "code", "options")

_PART = re.compile(
    rf"<!-- {PACKAGE}:(?P<name>\w+) (?P<hash>\w+) -->[ \t]*\n(?P<text>.*?)\n"
    rf"<!-- /{PACKAGE}:(?P=name) -->(?P<after>\s*)",
    re.DOTALL,
)
_FRONT = re.compile(r"\A---[ \t]*\n(?P<yaml>.*?)\n---[ \t]*\n", re.DOTALL)
_NOTE_START = re.compile(rf"<!-- {PACKAGE}:card (\w+)")
_NOTE = (
    "The parts between the markers are written anew when the model is saved, unless you edit them; "
    "what stands elsewhere stays."
)


def new_text(card: Card) -> str:
    """The whole file."""
    yaml = card.metadata.strip("\n")
    note = f"<!-- {PACKAGE}:card {_hash(yaml)} {_NOTE} -->"
    return "\n\n".join([f"---\n{yaml}\n---\n{note}", *(_marked(*part) for part in card.parts.items())]) + "\n"


def renewed_text(old: str | None, card: Card, only: tuple[str, ...] | None = None) -> str:
    """The file `old` with what is ours brought up to date, or `only` some parts of it; a new one for None."""
    if old is None or not old.strip() or _is_template(old):
        return new_text(card)
    text = old.replace("\r\n", "\n")
    if _PART.search(text) is None:
        if _TRAINER not in text:
            return old
        parts = [_marked(name, text) for name, text in card.parts.items() if name in _BESIDE_TRAINER]
        return "\n\n".join([_with_tags(text, card).rstrip("\n"), *parts]) + "\n"
    text = _PART.sub(lambda part: _renewed_part(part, card.parts) if _is_in(part["name"], only) else part[0], text)
    text = _with_new_parts(text.rstrip() + "\n", card.parts)
    if only is not None:
        return text
    return _with_metadata(text, card) if _NOTE_START.search(text) else _with_tags(text, card)


def read_card(path: Path) -> str | None:
    """The text of a card, whatever its line ends and encoding, so that `write_whole` can write it back as it was."""
    return path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else None


def parsed(text: str) -> ModelCard | None:
    """A card with its metadata; None where there are none that can be read."""
    if not _FRONT.match(text.replace("\r\n", "\n")):
        return None
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (TypeError, ValueError, YAMLError):
        return None


def parts_of(text: str) -> dict[str, str]:
    """The parts of a card, as they stand there."""
    return {part["name"]: part["text"] for part in _PART.finditer(text.replace("\r\n", "\n"))}


def renamed_text(text: str, old: str, new: str) -> str:
    """The file with another name of the model in its metadata, which somebody may have edited."""
    card = parsed(text)
    if card is None or card.data.get("model_name") != old or old == new:
        return text
    card.data.model_name = new
    return card.content


def is_ours(text: str) -> bool:
    """Whether all of a file was written by the package, and nothing was edited."""
    text = text.replace("\r\n", "\n")
    front = _FRONT.match(text)
    rest = _PART.sub("", text[front.end() :] if front else text)
    note = re.fullmatch(rf"\s*<!-- {PACKAGE}:card (\w+) {re.escape(_NOTE)} -->\s*", rest)
    unedited = all(_hash(part["text"]) == part["hash"] for part in _PART.finditer(text))
    return _is_template(text) or (bool(front and note) and unedited and note[1] == _hash(front["yaml"]))


def _is_in(name: str, only: tuple[str, ...] | None) -> bool:
    return only is None or name in only


def _marked(name: str, text: str) -> str:
    return f"<!-- {PACKAGE}:{name} {_hash(text)} -->\n{text}\n<!-- /{PACKAGE}:{name} -->"


def _hash(text: str) -> str:
    """Of a text, whatever its line ends and the spaces before them, which editors change by themselves."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _renewed_part(part: re.Match[str], parts: Mapping[str, str]) -> str:
    if _hash(part["text"]) != part["hash"]:
        return part[0]
    return _marked(part["name"], parts[part["name"]]) + part["after"] if part["name"] in parts else ""


def _with_new_parts(text: str, parts: Mapping[str, str]) -> str:
    """Adds the parts that come and go, each behind the one before it in a new card, or at the end."""
    known = list(parts)
    present = {part["name"]: part.start("after") for part in _PART.finditer(text)}
    for name in _COMES_AND_GOES:
        if name in parts and name not in present:
            before = [present[x] for x in known[: known.index(name)] if x in present]
            end = max(before, default=len(text.rstrip("\n")))
            text = f"{text[:end]}\n\n{_marked(name, parts[name])}{text[end:]}"
    return text


def _with_metadata(text: str, card: Card) -> str:
    """Replaces the metadata if nobody has edited them."""
    front, note = _FRONT.match(text), _NOTE_START.search(text)
    if not front or not note or note[1] != _hash(front["yaml"]):
        return text
    yaml = card.metadata.strip("\n")
    rest = text[front.end() :].replace(note[0], f"<!-- {PACKAGE}:card {_hash(yaml)}", 1)
    return f"---\n{yaml}\n---\n{rest}"


def _with_tags(text: str, card: Card) -> str:
    """Adds the tags of ours that are missing to the metadata of another's card, such as Trainer's."""
    other = parsed(text)
    if other is None:
        return text
    wanted = parsed(f"---\n{card.metadata}\n---\n").data.tags or []
    tags = [other.data.tags] if isinstance(other.data.tags, str) else list(other.data.tags or [])
    missing = [tag for tag in wanted if tag not in tags]
    if not missing:
        return text
    other.data.tags = tags + missing
    return other.content


def _is_template(text: str) -> bool:
    """Whether it is the card that transformers puts in place of a missing one, as it was written."""
    card = parsed(text) if "This model card has been automatically generated." in text else None
    if card is None:
        return False
    lines = (line for line in text.splitlines() if line.startswith("This is the model card of"))
    fresh = ModelCard.from_template(card.data, model_description=next(lines, ""))
    return fresh.text.strip() == card.text.strip()
