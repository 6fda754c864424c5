"""Every family has a card of one shape that the Hub can render, and every command of the documents exists."""

import re
from pathlib import Path

import pytest
from commands import ROOT, commands_of, docstring_commands, flags_of, problems
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_efficient_attn import FAMILIES


CARDS = ROOT / "model_cards"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted(CARDS.glob("*.md")),
]
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
LICENSE = "apache-2.0"

# Sections of every card, in this order. A family's own ones stand between Options and Limits.
SECTIONS = ["What it is", "When to use it", "Formula", "Cost", "Options", "Limits", "Figures"]
FIGURES = ["Parity", "Speed and memory", "Task results"]

EVERY_CARD = pytest.mark.parametrize("family", FAMILIES)
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def card_of(family: str) -> str:
    return (CARDS / f"{family}.md").read_text(encoding="utf-8")


def parts_of(text: str, level: int) -> dict[str, str]:
    """Heading of a level -> what stands below it, code blocks without their comments."""
    without_code = re.sub(
        r"^```.*?^```", lambda block: block[0].replace("\n#", "\n"), text, flags=re.DOTALL | re.MULTILINE
    )
    pieces = re.split(rf"^{'#' * level} (.+)$", without_code, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@EVERY_CARD
def test_a_card_has_valid_metadata(family: str) -> None:
    card = ModelCard(card_of(family))
    assert card.data.library_name == "transformers" and card.data.license == LICENSE
    assert {family, "hf_efficient_attn"} <= set(card.data.tags)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@EVERY_CARD
def test_a_card_has_the_sections(family: str) -> None:
    card = card_of(family)
    assert re.findall(r"^# (.+)$", card.split("## ")[0], re.MULTILINE) == [f"Eff{FAMILIES[family].name}"]
    parts = parts_of(card, 2)
    assert [title for title in parts if title in SECTIONS] == SECTIONS
    titles = list(parts)
    assert titles[: SECTIONS.index("Options") + 1] == SECTIONS[: SECTIONS.index("Options") + 1]
    assert titles[-2:] == SECTIONS[-2:]
    assert all(text.strip() for text in parts.values()), [title for title, text in parts.items() if not text.strip()]
    assert "```text" in parts["Formula"], "the formula, written out"
    assert re.search(r"O\(.+\)", parts["Cost"])


@EVERY_CARD
def test_figures_have_their_commands(family: str) -> None:
    """Each kind of figure has a command that gives it, or the card says that it was not measured."""
    figures = parts_of(parts_of(card_of(family), 2)["Figures"], 3)
    assert list(figures) == FIGURES
    for title, text in figures.items():
        assert commands_of(text) or text.strip().startswith("Not measured"), title
        for paragraph in re.split(r"\n\n(?!\|)", text):  # a table belongs to what stands before it
            if re.search(r"^\|", paragraph, re.MULTILINE):
                assert commands_of(paragraph), f"{title}: no command for\n{paragraph}"


@EVERY_CARD
def test_every_option_of_the_family_is_named(family: str) -> None:
    row = FAMILIES[family]
    module = row.module("configuration")
    cls = getattr(module, row.config_name)
    own = {
        name
        for base in cls.__mro__
        if base.__module__ == module.__name__ or base.__name__.endswith("Options")
        for name in base.__dict__.get("__annotations__", {})
        if not name.isupper() and "ClassVar" not in str(base.__annotations__[name])
    }
    text = card_of(family)
    # Pairs are written `lsh_num_chunks_before`, `_after`.
    missing = {name for name in own - SHARED if f"`{name}" not in text and name.removesuffix("_after") == name}
    assert not missing


# Every family has them; a family's own default of one is its published model's.
SHARED = set(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob
    layer_norm_eps max_position_embeddings position_offset pad_token_id bos_token_id eos_token_id sep_token_id
    type_vocab_size tie_word_embeddings chunk_size_feed_forward
    """.split()
)


def tables_of(text: str) -> list[list[str]]:
    """Runs of lines that begin with a bar, outside code."""
    tables: list[list[str]] = [[]]
    for line in re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def columns_of(row: str) -> int:
    """Cells of a row; bars in code or after a backslash are none."""
    return len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) - 1


@EVERY_DOCUMENT
def test_tables_render(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    tables = tables_of(text)
    for table in tables:
        assert len({columns_of(row) for row in table}) == 1, "\n".join(table)
        assert re.fullmatch(r"(\| :?-+:? )+\|", table[1]), table[1]
    rendered = MarkdownIt("commonmark").enable("table").render(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))
    assert rendered.count("<table>") == len(tables)
    assert rendered.count("<tr>") == sum(len(table) - 1 for table in tables)
    assert text.count("```") % 2 == 0


@EVERY_DOCUMENT
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        page = document.parent / path if path else document
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, target


@EVERY_DOCUMENT
def test_commands_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    commands = commands_of(text)
    assert not [f"`{command}`: {problem}" for command in commands for problem in problems(command)]
    # "with `--backward`": an option of one of the scripts that the document names.
    scripts = [ROOT / word for command in commands for word in command.split() if word.endswith(".py")]
    known = {flag for script in scripts if script.is_file() for flag in flags_of(script)} | {"--help"}
    named = [code.split()[0] for code in re.findall(r"`(--[a-z][^`]*)`", text)]
    assert not [flag for flag in named if flag not in known]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_commands_of_scripts_exist(script: Path) -> None:
    commands = docstring_commands(script)
    assert not [f"`{command}`: {problem}" for command in commands for problem in problems(command)]
    beside = any(node in script.read_text(encoding="utf-8") for node in ("__main__", "typer.run"))
    assert commands or not beside, "a script says how it is run"


def test_documents_have_commands() -> None:
    assert all(commands_of(path.read_text(encoding="utf-8")) for path in DOCUMENTS if path.stem != "MIGRATION")


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python benchmarks/longformer.py --lengths 4096 --out results.md", None),
        ("OMP_WAIT_POLICY=PASSIVE python benchmarks/vit.py --sizes 224", None),
        ("python benchmarks/longformer.py --sizes 4096", "has no option --sizes"),
        ("python benchmarks/nowhere.py", "there is no script benchmarks/nowhere.py"),
        ("python examples/train_vit.py --attention-options={} --epochs 3", None),
        ("python examples/train_vit.py --attention-option {}", "has no option --attention-option"),
        ("python -m hf_efficient_attn bench --lengths 1024", None),
        ("python -m hf_efficient_attn bench --length 1024", "has no option --length"),
        ("hf-efficient-attn fly", "has no command fly"),
        ("python -m nowhere", "there is no module nowhere"),
        ("accelerate launch --num_processes 2 examples/train_vit.py --epochs 3", None),
        ("accelerate launch --num_processes 2 examples/train_vit.py --epoch 3", "has no option --epoch"),
        ("accelerate launch --config_file examples/nowhere.yaml examples/train_vit.py", "there is no examples/nowhere"),
        ("pytest tests/test_formulas.py -k performer", None),
        ('pytest tests/test_performer.py -k "unbiased or falls"', None),
        ("pytest tests/test_nowhere.py", "there is no tests/test_nowhere.py"),
        ("pytest tests/test_formulas.py -k nothing_like_it", "-k nothing_like_it selects no test"),
        ("pytest tests/test_formulas.py::test_nothing", "has no test_nothing"),
        ("make test PYTEST_ARGS='-k longformer -x'", None),
        ("make test PYTEST_ARGS='-k nothing_like_it'", "selects no test"),
        ("make tests", "no target tests"),
        ("make test PYTEST=1", "no setting PYTEST"),
        ('pip install ".[demo]"', None),
        ('pip install ".[nowhere]"', "no extra nowhere"),
    ],
)
def test_what_does_not_exist_is_found(command: str, problem: str | None) -> None:
    found = problems(command)
    assert (not found) if problem is None else any(problem in each for each in found), found


def test_commands_are_found_in_a_text() -> None:
    inline = "Run `make test`\nor `python\nexamples/x.py --y`, not `python` or `pipeline(...)`.\n"
    blocks = "```\n$ make a \\\n  b  # c\n```\n```python\nmake c\n```\n"
    assert commands_of(inline + blocks) == ["make a b", "make test", "python examples/x.py --y"]
