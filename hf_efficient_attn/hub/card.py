"""A model card, in parts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .code_file import Code
from .facts import PACKAGE, Folder, Known, base_models, is_hub_name, listed, package_version, versions


NOT_RECORDED = "not recorded"

NOT_ON_PYPI = f"Until {PACKAGE} is on PyPI: `pip install .` in a checkout of it."


@dataclass(frozen=True)
class Card:
    """Metadata of a card, and its parts by name in their order."""

    metadata: str
    parts: dict[str, str] = field(default_factory=dict)


def make_card(folder: Folder, known: Known, *, name: str, repo_id: str | None = None, code: Code | None = None) -> Card:
    """The card of a saved model.

    Args:
        folder: the saved model.
        known: what its user says of it.
        name: the title.
        repo_id: its name on the Hub, where it has one.
        code: the code file that comes with it.
    """
    parts = {
        "model": _model(folder, known, name),
        "loading": _loading(folder, repo_id or name),
        "code": "" if code is None else _code(folder, repo_id or name, code),
        "options": _options(folder),
        "training": _training(folder, known, repo_id),
        "versions": _versions(),
    }
    metadata = _metadata(folder, known, name, repo_id)
    return Card(metadata.to_yaml(), {part: text for part, text in parts.items() if text})


def _metadata(folder: Folder, known: Known, name: str, repo_id: str | None) -> ModelCardData:
    datasets = [x for x in listed(known.datasets) if is_hub_name(x)]
    results = None
    # The Hub refuses a result without task or data.
    if folder.task is not None and len(datasets) == 1 and known.figures:
        common = {"task_type": folder.task, "dataset_type": datasets[0], "dataset_name": datasets[0]}
        results = [EvalResult(**common, metric_type=x, metric_value=value) for x, value in known.figures.items()]
    family = [folder.model_type] if folder.is_stock else [PACKAGE, folder.model_type]
    return ModelCardData(
        base_model=_one_or_all([x for x in base_models(known, folder.source, repo_id) if is_hub_name(x)]),
        datasets=datasets or None,
        eval_results=results,
        model_name=name if results else None,
        language=known.language,
        library_name="transformers",
        license=known.license,
        pipeline_tag=folder.task,
        tags=[*family, *(x for x in listed(known.tags) if x not in family)],
    )


def _one_or_all(values: list[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else values or None


def _model(folder: Folder, known: Known, name: str) -> str:
    family = f"`{folder.architecture}` of {PACKAGE}: {folder.mechanism}"
    if folder.derived is not None:
        family = f"`{folder.derived}`, a class of its own on {family}"
    if folder.is_stock:
        family = f"`{folder.architecture}` of transformers, trained with {PACKAGE} as an `{folder.config.model_type}`."
    return "\n\n".join([f"# {name}", family, *([known.summary.strip()] if known.summary else [])])


def _auto_class(folder: Folder) -> str | None:
    """The Auto class that loads it by its name or path; AutoBackbone takes a path for a name on the Hub."""
    return None if folder.auto_class == "AutoBackbone" else folder.auto_class


def _loading(folder: Folder, source: str) -> str:
    auto = _auto_class(folder)
    if folder.is_stock:
        lines = [
            f"from transformers import {folder.architecture}",
            "",
            f'model = {folder.architecture}.from_pretrained("{source}")',
        ]
        return "\n".join(["## Load", "", "It needs nothing but transformers:", "", "```python", *lines, "```"])
    reader = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "processor"}
    reads = "AutoImageProcessor" if folder.row.image_processor is not None else "AutoTokenizer"
    cls = auto or folder.architecture
    if auto is None:
        imports = [f"from {PACKAGE} import {cls}", f"from transformers import {reads}"]
    else:
        imports = [
            f"import {PACKAGE}  # makes the Auto classes know this family; trust_remote_code is not needed",
            f"from transformers import {', '.join(sorted((auto, reads)))}",
        ]
    lines = [
        *imports,
        "",
        f'model = {cls}.from_pretrained("{source}")',
        f'{reader[reads]} = {reads}.from_pretrained("{source}")  # where it was saved as well',
    ]
    needs = ["```", f'pip install "{PACKAGE}>={package_version()}"', "```", "", NOT_ON_PYPI]
    if folder.derived is not None:
        needs += ["", f"`{folder.derived}` is no class of the package, which loads its weights as a `{cls}`:"]
    return "\n".join(["## Load", "", *needs, "", "```python", *lines, "```"])


def _code(folder: Folder, source: str, code: Code) -> str:
    if (auto := _auto_class(folder)) is not None:
        runs = "`trust_remote_code=True` runs that file."
        lines = [
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("{source}", trust_remote_code=True, revision="<commit>")',
        ]
    else:  # a head that no Auto class knows
        runs = "The first call runs that file."
        name = f"{Path(code.name).stem}.{folder.architecture}"
        lines = [
            "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
            "",
            f'cls = get_class_from_dynamic_module("{name}", "{source}", revision="<commit>")',
            f'model = cls.from_pretrained("{source}", revision="<commit>")',
        ]
    return "\n".join(
        [
            "## Load without the package",
            "",
            f"`{code.name}` holds the code of the family `{folder.model_type}` from {PACKAGE} {code.version}, so that "
            "the model loads where the package is not installed:",
            "",
            "```python",
            *lines,
            "```",
            "",
            f"{runs} Read it, and name the commit that you have read: `revision` pins "
            "weights and code, `code_revision` the code alone. Its sha256:",
            "",
            "```",
            f"{code.sha256}  {code.name}",
            "```",
            "",
            f"After `import {PACKAGE}` the package's own classes load the model and the file is not run.",
        ]
    )


def _options(folder: Folder) -> str:
    rows = [f"| `{name}` | {_shown(value)} | {_shown(default)} |" for name, value, default in folder.options()]
    if not rows:
        return f"## Options\n\nAll options of `{type(folder.config).__name__}` have their defaults."
    head = f"Those of `{type(folder.config).__name__}` that differ from its defaults:"
    return "\n".join(["## Options", "", head, "", "| Option | Value | Default |", "| --- | --- | --- |", *rows])


def _shown(value: Any) -> str:
    text = str(value).replace("|", "\\|")
    return f"`{text}`" if len(text) <= 80 else f"`{text[:77]}...`"


def _training(folder: Folder, known: Known, repo_id: str | None) -> str:
    models = [
        f"[{x}](https://huggingface.co/{x})" if is_hub_name(x) else x
        for x in base_models(known, folder.source, repo_id)
    ]
    lines = [
        "## Training",
        "",
        f"- Base model: {', '.join(models) or NOT_RECORDED}",
        f"- Data: {', '.join(listed(known.datasets)) or NOT_RECORDED}",
        f"- Metrics: {NOT_RECORDED if not known.figures else ''}".rstrip(),
    ]
    if known.figures:
        rows = [f"| {name} | {value:.6g} |" for name, value in known.figures.items()]
        lines += ["", "| Metric | Value |", "| --- | --- |", *rows]
    return "\n".join(lines)


def _versions() -> str:
    return "\n".join(["## Versions", "", *(f"- {name} {number}" for name, number in versions().items())])
