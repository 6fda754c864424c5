"""The commands that documents and docstrings name, and what in them does not exist. Nothing is run, or imported but the
command line of the package, which is cheap.
"""

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import typer.main

from hf_efficient_attn import ATTENTIONS, FAMILIES
from hf_efficient_attn.cli import app


ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", "pytest", "make", "hf-efficient-attn", "pip", "accelerate", "torchrun")
LAUNCHERS = {"accelerate": ["launch"], "torchrun": []}
# What a name on pytest's -k may also be a part of: the ids of tests over tables.
IDS = {*FAMILIES, *ATTENTIONS}


def commands_of(text: str) -> list[str]:
    """The commands of a markdown text: lines of its blocks without a language or of a shell, and inline code."""
    found, rest, start = [], [], 0
    for block in re.finditer(r"^ *```(\w*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        rest.append(text[start : block.start()])
        start = block.end()
        if block[1] in ("", "sh", "bash", "shell", "console"):
            found += lines_of(block[2])
    inline = re.findall(r"`([^`]+)`", "\n".join([*rest, text[start:]]))
    return found + [" ".join(code.split()) for code in inline if program_of(code) is not None]


def docstring_commands(path: Path) -> list[str]:
    """The commands in the docstring of a script."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return [line for line in lines_of(text) if program_of(line) is not None]


def lines_of(block: str) -> list[str]:
    """Command lines without comments, those that go on after a backslash joined."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.removeprefix("$ ").split()) for line in lines if line]


def program_of(command: str) -> str | None:
    """The program that a command starts, after settings of the environment; None if it is none of `PROGRAMS`."""
    words = re.sub(r"^([A-Z_]+=\S+\s+)+", "", command.strip()).split()
    if not words or words[0] not in PROGRAMS or (len(words) == 1 and words[0] in ("python", "pip", "accelerate")):
        return None
    return words[0]


def problems(command: str) -> list[str]:
    """What in a command does not exist: files, options, tests, targets, modules, extras."""
    program = program_of(command)
    if program is None:
        return [f"no command that is known here: {command}"]
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word) or program == "make"]
    return list(_problems(program, words[1:]))


def _problems(program: str, words: list[str]) -> Iterator[str]:
    for word in words:
        is_path = re.match(r"(examples|benchmarks|tests|model_cards)/", word) and program != "make"
        if is_path and "--out" not in words and not (ROOT / word.split("::")[0]).exists():
            yield f"there is no {word}"
    if program in LAUNCHERS:
        yield from _launched(words[len(LAUNCHERS[program]) :])
    elif program == "python":
        yield from _python(words)
    elif program == "pytest":
        yield from _pytest(words)
    elif program == "make":
        yield from _make(words)
    elif program == "pip":
        yield from _pip(words)
    else:
        yield from _cli(words)


def _launched(words: list[str]) -> Iterator[str]:
    """A launcher's own options are another project's; what it starts is ours."""
    for place, word in enumerate(words):
        if word == "-m" or word.endswith(".py"):
            yield from _python(words[place:])
            return
    yield "it starts nothing"


def _python(words: list[str]) -> Iterator[str]:
    if words[0] == "-c":
        return
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "pytest":
            yield from _pytest(rest)
        elif module == "hf_efficient_attn":
            yield from _cli(rest)
        elif module == "pip":
            yield from _pip(rest)
        elif importlib.util.find_spec(module.split(".")[0]) is None:
            yield f"there is no module {module}"
        return
    script = ROOT / words[0]
    if not words[0].endswith(".py") or not script.is_file():
        yield f"there is no script {words[0]}"
        return
    yield from _unknown_flags(words[1:], flags_of(script), words[0])


def _cli(words: list[str]) -> Iterator[str]:
    commands = typer.main.get_command(app).commands
    if not words or words == ["--help"]:
        return
    if words[0] not in commands:
        yield f"hf-efficient-attn has no command {words[0]}"
        return
    command, rest = commands[words[0]], words[1:]
    if command.context_settings.get("ignore_unknown_options"):  # the rest belongs to what it starts
        rest = []
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    yield from _unknown_flags(rest, known, f"hf-efficient-attn {words[0]}")


def _unknown_flags(words: list[str], known: set[str], where: str) -> Iterator[str]:
    for word in words:
        flag = word.split("=")[0]
        if re.match(r"--?[a-zA-Z]", flag) and flag not in known | {"--help"}:
            yield f"{where} has no option {flag}"


@cache
def flags_of(script: Path) -> set[str]:
    """The options of a script: of its argparse or typer, modules beside it, the package's studies and recipes."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            found |= set(_strings(node.args))
        elif (
            isinstance(node, ast.arg) and node.annotation is not None and "typer.Option" in ast.unparse(node.annotation)
        ):
            option = node.annotation.slice.elts[1]
            plain = f"--{node.arg.replace('_', '-')}"
            negated = (
                {plain.replace("--", "--no-", 1)} if ast.unparse(node.annotation.slice.elts[0]) == "bool" else set()
            )
            found |= set(_strings(option.args)) or {plain, *negated}
        elif isinstance(node, ast.ImportFrom) and node.module and script.with_name(f"{node.module}.py").is_file():
            found |= flags_of(script.with_name(f"{node.module}.py"))
        elif isinstance(node, ast.Attribute) and node.attr == "RecipeParser":
            found |= flags_of(ROOT / "hf_efficient_attn" / "recipes" / "options.py")
        elif isinstance(node, ast.Name) and node.id == "study_app":
            found |= (
                flags_of(ROOT / "hf_efficient_attn" / "bench" / "study.py") if script.parent.name != "bench" else set()
            )
    return {flag for flag in found if flag.startswith("-")}


def _strings(nodes: list[ast.expr]) -> list[str]:
    return [name for node in nodes if isinstance(node, ast.Constant) for name in str(node.value).split("/")]


def _pytest(words: list[str]) -> Iterator[str]:
    files = [ROOT / word.split("::")[0] for word in words if word.startswith("tests")]
    for word in words:
        file, _, test = word.partition("::")
        if test and test.split("[")[0] not in tests_of(ROOT / file):
            yield f"{file} has no {test}"
    if "-k" in words:
        yield from _selected(words[words.index("-k") + 1], files or sorted((ROOT / "tests").glob("test_*.py")))


def _selected(expression: str, files: list[Path]) -> Iterator[str]:
    names = {name for file in files if file.is_file() for name in (*tests_of(file), file.stem)} | IDS
    for word in re.findall(r"[\w-]+", re.sub(r"\bnot\s+\w+", "", expression)):
        if word not in ("and", "or", "not") and not any(word in name for name in names):
            yield f"-k {word} selects no test of {', '.join(file.name for file in files[:3])}"


@cache
def tests_of(file: Path) -> set[str]:
    """Names of the test functions of a file."""
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def _make(words: list[str]) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_setting, value = word.partition("=")
        if is_setting:
            if not re.search(rf"^#   {name}\b", makefile, re.MULTILINE):
                yield f"the Makefile has no setting {name}"
            if name == "PYTEST_ARGS" and "<" not in value:
                yield from _pytest(shlex.split(value))
        elif not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            yield f"the Makefile has no target {word}"


def _pip(words: list[str]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        own = re.fullmatch(r"(?:\.|hf_efficient_attn)\[([\w,-]+)\]", word)
        for extra in own[1].split(",") if own else ():
            if extra not in project["optional-dependencies"]:
                yield f"there is no extra {extra}"
