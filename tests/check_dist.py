"""`make dist`: builds sdist and wheel into dist/ and tries them the way a user meets them, away from the checkout.

The wheel is built from the sdist and installed, without the extras, into a clean venv in a temporary folder. There the
snippets of README.md and the model cards run on it, from the unpacked sdist without its package.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PACKAGE = "hf_efficient_attn"

# What the sdist holds, next to what hatchling adds on its own.
FOLDERS = (PACKAGE, "tests", "examples", "benchmarks", "model_cards")
FILES = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
FILES |= {path.name for path in ROOT.glob("constraints*.txt")}
ADDED = {"PKG-INFO", ".gitignore"}

PROBE = f"""
import importlib.metadata, json, sysconfig, {PACKAGE} as package
metadata = importlib.metadata.metadata("{PACKAGE}").json
print(json.dumps([package.__file__, sysconfig.get_path("purelib"), package.__version__, metadata]))
"""


def main() -> None:
    # Python would end at once and leave the venv, a gigabyte, behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("make dist: ended by a signal"))
    with TemporaryDirectory(prefix=f"{PACKAGE}-dist-") as folder:
        work = Path(folder).resolve()
        if work.is_relative_to(ROOT):
            sys.exit(f"make dist: the temporary folder {work} lies in the checkout; set TMPDIR to another place")
        sdist, wheel = build(work)
        check_wheel(wheel)
        tree = unpack(sdist, work)
        check_installed(wheel, tree, work)
    print(f"make dist: {sdist.name} and {wheel.name} are good.")


def build(work: Path) -> tuple[Path, Path]:
    """Sdist and the wheel made from it, in dist/; the wheel made from the checkout has to be the same."""
    shutil.rmtree(DIST, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation"]
    run("building the sdist, and the wheel from it", [*command, "--outdir", DIST, ROOT], work)
    run("building the wheel from the checkout", [*command, "--wheel", "--outdir", work / "direct", ROOT], work)
    (sdist,), (wheel,), (direct,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl"), (work / "direct").glob("*.whl")
    if contents(wheel) != contents(direct):
        sys.exit("make dist: the wheel built from the sdist differs from the one built from the checkout")
    return sdist, wheel


def check_wheel(wheel: Path) -> None:
    """The package as it lies in the checkout, its metadata with the license, and nothing else."""
    inside = contents(wheel)
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in inside):
        sys.exit("make dist: the wheel lacks the LICENSE")
    expected = in_checkout([PACKAGE])
    same_names("wheel", {name for name in inside if ".dist-info/" not in name}, expected)
    changed = [name for name in expected if inside[name] != (ROOT / name).read_bytes()]
    if changed:
        sys.exit(f"make dist: other in the wheel than in the checkout: {', '.join(sorted(changed))}")


def unpack(sdist: Path, work: Path) -> Path:
    """The sdist's files without the package, so that only the installed one can be imported."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    tree = work / sdist.name.removesuffix(".tar.gz")
    inside = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    same_names("sdist", inside - ADDED, in_checkout(FOLDERS) | FILES)
    shutil.rmtree(tree / PACKAGE)
    return tree


def check_installed(wheel: Path, tree: Path, work: Path) -> None:
    """Metadata, command and snippets in a venv that holds the wheel and what pytest needs."""
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["-c", ROOT / "constraints.txt", wheel, "pytest", "pytest-timeout"]
    run("installing the wheel into a clean venv (a few minutes)", install, work)

    probed = run("reading its metadata", [python, "-c", PROBE], tree)
    file, site_packages, version, metadata = json.loads(probed.splitlines()[-1])
    if not Path(file).is_relative_to(site_packages) or not Path(site_packages).is_relative_to(work):
        sys.exit(f"make dist: tested would be {file}, which is not in {site_packages}")
    check_metadata(version, metadata)

    helped = run("hf-efficient-attn --help", [python.with_name("hf-efficient-attn"), "--help"], work)
    if not all(command in helped for command in ("demo", "bench")):
        sys.exit(f"make dist: hf-efficient-attn --help names no demo or bench:\n{helped}")

    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_readme.py", "-k", "snippet"]
    print(run("the snippets of README.md and the model cards", pytest, tree).splitlines()[-1])


def check_metadata(version: str, metadata: dict) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [Requirement(line) for line in metadata["requires_dist"]]
    found = {
        "name": (metadata["name"], project["name"]),
        "version": (metadata["version"], project["version"]),
        "__version__": (version, project["version"]),
        "license": (metadata["license_expression"], project["license"]),
        "Python": (metadata["requires_python"], project["requires-python"]),
        "extras": (sorted(metadata["provides_extra"]), sorted(project["optional-dependencies"])),
        "dependencies": (
            {str(each) for each in required if not each.marker},
            {str(Requirement(line)) for line in project["dependencies"]},
        ),
        "description's type": (metadata["description_content_type"], "text/markdown"),
        "description": (metadata["description"].strip(), (ROOT / "README.md").read_text(encoding="utf-8").strip()),
    }
    for field, (is_, should_be) in found.items():
        if is_ != should_be:
            sys.exit(f"make dist: {field} of the installed package is {is_!r}, not {should_be!r}")


def run(step: str, command: list, folder: Path) -> str:
    """What `command` printed, without the checkout on its path. A command that fails ends the check."""
    print(f"{step} ...", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nmake dist: {step}: ended with {done.returncode}, see above")
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def in_checkout(folders: Iterable[str]) -> set[str]:
    """The files below `folders`, without what Python and the system leave there."""
    paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {p.as_posix() for p in paths if not any(part == "__pycache__" or part.startswith(".") for part in p.parts)}


def same_names(archive: str, inside: set[str], expected: set[str]) -> None:
    for what, names in (("lacks", expected - inside), ("holds, and should not,", inside - expected)):
        if names:
            sys.exit(f"make dist: the {archive} {what} {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
