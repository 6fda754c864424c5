"""The files of `examples/accelerate`: accelerate's own launcher reads them, and two processes train with one."""

import json
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from commands import flags_of


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "accelerate"

# What each file is to come to: options of the launcher.
EXPECTED: dict[str, dict[str, Any]] = {
    "one_gpu": {"num_processes": 1, "num_machines": 1, "multi_gpu": False},
    "two_gpus": {"num_processes": 2, "num_machines": 1, "multi_gpu": True},
    "eight_gpus": {"num_processes": 8, "num_machines": 1, "multi_gpu": True},
    "two_machines_rank0": {"num_processes": 16, "num_machines": 2, "machine_rank": 0, "multi_gpu": True},
    "two_machines_rank1": {"num_processes": 16, "num_machines": 2, "machine_rank": 1, "multi_gpu": True},
    "fsdp2": {"num_processes": 8, "num_machines": 1, "use_fsdp": True, "fsdp_version": 2},
    "deepspeed_zero2": {"num_processes": 8, "num_machines": 1, "use_deepspeed": True, "zero_stage": 2},
}
CONFIG = pytest.mark.parametrize("name", EXPECTED)


def command_of(path: Path) -> list[str]:
    """The arguments of the one command in the comment at the top."""
    lines = [line.removeprefix("#").strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    (command,) = (line for line in lines if line.startswith("accelerate launch "))
    return shlex.split(command)[2:]


def launched(path: Path) -> Namespace:
    """What the launcher makes of that command."""
    return _validate_launch_command(launch_command_parser().parse_args(command_of(path)))[0]


def test_every_file_is_expected_and_in_the_readme() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()
    text = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"]({name}.yaml)" in text for name in EXPECTED)


@CONFIG
def test_accelerate_knows_every_key(name: str) -> None:
    """Of parts of a file it takes any key: those have to be options of the launcher."""
    path = FOLDER / f"{name}.yaml"
    load_config_from_file(str(path))
    options = vars(launch_command_parser().parse_args(["script.py"]))
    for part, values in yaml.safe_load(path.read_text("utf-8")).items():
        if isinstance(values, dict):
            assert part in ("fsdp_config", "deepspeed_config")
            assert values.keys() <= options.keys(), sorted(values.keys() - options.keys())


def test_a_misspelled_key_is_found(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text((FOLDER / "two_gpus.yaml").read_text("utf-8").replace("num_machines", "num_machine"), "utf-8")
    with pytest.raises(ValueError, match="num_machine"):
        load_config_from_file(str(broken))


@CONFIG
def test_the_command_at_the_top_does_what_the_file_is_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = FOLDER / f"{name}.yaml"
    args = launched(path)
    assert Path(args.config_file).resolve() == path
    assert {option: getattr(args, option) for option in EXPECTED[name]} == EXPECTED[name]
    assert args.mixed_precision == "bf16" and not args.use_cpu
    options = {option for option in args.training_script_args if option.startswith("--")}
    assert options <= flags_of(Path(args.training_script)), options
    if name == "deepspeed_zero2":
        return
    # A value that is none of accelerate's raises here.
    args.main_process_port = 0
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("FSDP_VERSION") == ("2" if name == "fsdp2" else None)


def test_two_machines_differ_in_their_rank_only() -> None:
    first, second = (yaml.safe_load((FOLDER / f"two_machines_rank{rank}.yaml").read_text("utf-8")) for rank in (0, 1))
    assert first.pop("machine_rank") == 0 and second.pop("machine_rank") == 1
    assert first == second


def test_an_example_trains_on_two_processes(tmp_path: Path) -> None:
    """With the file for two GPUs, on a CPU: half the steps of one process, in bfloat16, and one model in the end."""
    rows = ["red round apple {},fruit", "blue cold sea {},air"]
    rows = [rows[row % 2].format(row) for row in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "two_gpus.yaml")]
    command += ["--main_process_port", "0", str(ROOT / "examples" / "finetune_classification.py"), "--cpu"]
    command += ["--dataset", "rows.csv", "--max-length", "16", "--epochs", "2", "--batch-size", "4"]
    result = subprocess.run(
        [*command, "--output-dir", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    (last,) = (tmp_path / "out").glob("checkpoint-8")
    state = json.loads((last / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 8, "32 rows, four a process and step, two processes, two epochs"
    assert len(list(last.glob("rng_state_*.pth"))) == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()
