"""The measuring harness: bounds hold, what they stop is reported and the run goes on, predictions are right."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from typer.testing import CliRunner

from hf_efficient_attn.bench import (
    GIB,
    KINDS,
    MIB,
    Bounds,
    Case,
    Comparison,
    ModelSize,
    Result,
    available_bytes,
    check_folder,
    check_out,
    check_outputs,
    describe,
    environment_line,
    make_cases,
    markdown_tables,
    output_difference,
    plot,
    print_tables,
    ratio_lines,
    run_cases,
    use_threads,
    write_csv,
)
from hf_efficient_attn.bench.memory import PeakMemory, resident_bytes
from hf_efficient_attn.bench.models import build_inputs, build_model
from hf_efficient_attn.bench.prediction import extrapolate, predict
from hf_efficient_attn.cli import app


TINY = ModelSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, vocab_size=64, attention_window=8)
WIDE = Bounds(seconds=60.0, memory_bytes=8 * GIB)


def finished(case: Case, seconds: float, peak: int, base: int = 300 * MIB) -> Result:
    return Result(case, seconds=[seconds] * 3, peak_bytes=peak, base_bytes=base)


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_every_kind_and_mode_is_measured_in_its_turn() -> None:
    cases = make_cases(["eff_longformer", "longformer", "bert", "modernbert"], [32], sizes=[TINY])
    seen: list[Result] = []
    results = run_cases(cases, WIDE, repeats=3, on_result=seen.append)

    assert [result.case for result in results] == cases
    assert seen == results
    for result in results:
        assert (result.status, result.predicted, len(result.seconds)) == ("ok", False, 3), result
        assert 0 < min(result.seconds) <= result.median <= max(result.seconds)
        assert 0 <= result.peak_bytes < GIB and 50 * MIB < result.base_bytes < 4 * GIB


def test_what_eats_memory_is_stopped_and_the_rest_goes_on() -> None:
    # 8 heads of 4,096 x 4,096 scores are half a gigabyte, and training keeps several of them.
    fat = Case("bert", 4096, "train", replace(TINY, num_heads=8, attention_window=None))
    over, ok = run_cases([fat, replace(fat, length=64)], Bounds(60.0, 1200 * MIB), repeats=1, warmup=0)
    assert (over.status, over.predicted, over.median) == ("over memory", False, None), over
    assert "bound 1,200 MiB" in describe(over)
    assert ok.status == "ok", ok


def test_what_eats_time_is_stopped_and_the_rest_goes_on() -> None:
    slow = Case("bert", 16384, "forward", ModelSize(256, 8, 4, 1024, 64, attention_window=None), threads=1)
    over, ok = run_cases([slow, replace(slow, length=16)], Bounds(2.0, 8 * GIB), repeats=1, warmup=0)
    assert (over.status, over.predicted, over.median) == ("over time", False, None), over
    assert "no end after 2.0 s" in describe(over)
    assert ok.status == "ok", ok


def test_what_is_predicted_to_go_past_is_not_started() -> None:
    lengths = [32, 64, 2**22]
    results = run_cases(make_cases(["bert"], lengths, ["forward"], [TINY]), Bounds(20.0, 4 * GIB), repeats=1)
    assert [result.status for result in results[:2]] == ["ok", "ok"]
    assert results[2].predicted and results[2].verdict in ("over time, predicted", "over memory, predicted")
    assert results[2].seconds == [] and "predicted" in results[2].detail


def test_a_total_limit_leaves_the_rest_out() -> None:
    results = run_cases(make_cases(["bert"], [32, 64], ["forward"], [TINY]), WIDE, total_seconds=0.0)
    assert [result.status for result in results] == ["no time left", "no time left"]


def test_a_case_that_fails_says_why_and_the_rest_goes_on() -> None:
    broken = Case("eff_longformer", 32, "forward", replace(TINY, vocab_size=2))
    results = run_cases([broken, Case("eff_longformer", 32, "forward", TINY)], WIDE, repeats=1)
    assert results[0].status == "failed" and "Error" in results[0].detail
    assert results[1].status == "ok"


def test_nothing_goes_on_once_the_caller_is_killed() -> None:
    job = (
        "from hf_efficient_attn.bench import Bounds, Case, ModelSize, run_cases\n"
        "case = Case('bert', 2048, 'train', task='base')\n"
        "run_cases([case], Bounds(seconds=600, memory_bytes=2**36), repeats=1000, case_seconds=600, "
        "on_result=print)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", job])
    try:
        deadline = time.monotonic() + 60
        family: list[psutil.Process] = []
        while len(family) < 2:  # the measuring process and the case's own
            assert caller.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
            family = psutil.Process(caller.pid).children(recursive=True)
    finally:
        caller.kill()
        caller.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


def test_predictions_grow_with_the_right_power() -> None:
    short = Case("bert", 1000, size=replace(TINY, attention_window=None))
    long = replace(short, length=4000)
    # Two points on b L + c L^2 determine it.
    points = [(length, 2e-6 * length + 3e-9 * length**2) for length in (1000, 2000)]
    assert extrapolate(points, long) == pytest.approx(2e-6 * 4000 + 3e-9 * 4000**2)
    # One point: between linear and quadratic, nearer to quadratic the longer it is.
    assert 4.0 < extrapolate(points[:1], long) / points[0][1] < 16.0
    # Noise that makes the longer length cheaper must not give a falling curve.
    assert extrapolate([(1000, 1.0), (2000, 0.9)], long) == pytest.approx(1.8)
    windowed = Case("eff_longformer", 4000, size=TINY)
    assert extrapolate([(1000, 1.0), (2000, 2.5)], windowed) == pytest.approx(5.0)


def test_predictions_look_at_their_own_series_only() -> None:
    bounds = Bounds(seconds=10.0, memory_bytes=GIB)
    case = Case("bert", 4096, "train", replace(TINY, attention_window=None))
    short = replace(case, length=1024)
    assert predict(case, [], bounds) is None
    assert predict(case, [finished(short, 0.01, MIB)], bounds) is None
    assert predict(case, [finished(replace(short, mode="forward"), 9.0, 900 * MIB)], bounds) is None
    assert predict(case, [finished(short, 9.0, MIB)], bounds).verdict == "over time, predicted"
    assert predict(case, [finished(short, 0.01, 500 * MIB)], bounds).verdict == "over memory, predicted"
    stopped = Result(short, "over memory", detail="")
    assert predict(case, [stopped], bounds).detail == "over memory at 1,024 tokens already"


def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = make_cases(["eff_longformer", "bert"], [1024, 4096], sizes=[TINY])
    results = [finished(case, 0.001 * case.length, case.length * MIB // 64) for case in cases]
    results[-1] = Result(cases[-1], "over memory", predicted=True, detail="about 9 GiB predicted")

    print_tables(results)
    table = capsys.readouterr().out
    assert "one forward pass" in table and "one training step" in table
    assert "over memory, predicted" in table and "4.10 (4.10 - 4.10)" in table

    rows = list(csv.DictReader(write_csv(results, tmp_path / "b.csv").open()))
    assert len(rows) == len(cases)
    assert rows[0]["kind"] == "eff_longformer" and float(rows[0]["seconds_median"]) == pytest.approx(1.024)
    assert rows[-1]["status"] == "over memory" and rows[-1]["predicted"] == "True"
    assert rows[-1]["seconds_median"] == rows[-1]["peak_bytes"] == ""

    image = plot(results, tmp_path / "b.png", "a title").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000


def test_peak_memory_sees_what_is_gone_again() -> None:
    peak = PeakMemory()
    peak.reset()
    before = resident_bytes()
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert peak.read() - before > 50 * MIB
    peak.reset()
    assert peak.read() - resident_bytes() < 32 * MIB
    assert available_bytes() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "berd"}, "kind is 'berd'.*eff_longformer"),
        ({"mode": "backward"}, "mode is 'backward'.*forward, train"),
        ({"length": 0}, "length is 0.*above 0"),
        ({"dtype": "int8"}, "dtype is 'int8'.*float32"),
        ({"size": replace(TINY, attention_window=None)}, "eff_longformer needs an attention_window"),
    ],
)
def test_wrong_cases_name_the_fix(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**{"kind": "eff_longformer", "length": 8, "size": TINY, **arguments})


def test_wrong_sizes_and_counts_name_the_fix() -> None:
    with pytest.raises(ValueError, match="hidden_size is 30 and num_heads 4"):
        ModelSize(hidden_size=30, num_heads=4)
    with pytest.raises(ValueError, match="attention_window is 7"):
        ModelSize(attention_window=7)
    with pytest.raises(ValueError, match="seconds is 0"):
        Bounds(0, GIB)
    with pytest.raises(ValueError, match="repeats is 0"):
        run_cases([], WIDE, repeats=0)


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    options = "--families eff_longformer,bert --lengths 32 --modes forward --windows 8,16 --hidden-size 16 --heads 2"
    result = CliRunner().invoke(app, ["bench", *options.split(), "--repeats", "1", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "eff_longformer w=8" in result.output and "eff_longformer w=16" in result.output
    assert (tmp_path / "benchmark.csv").is_file() and (tmp_path / "benchmark.png").is_file()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lengths", "1k", "--lengths is '1k', but it has to be whole numbers"),
        ("--families", "berd", "kind is 'berd', which is not known"),
        ("--max-seconds", "0", "seconds is 0.0"),
        ("--repeats", "0", "--repeats is 0"),
        ("--intermediate-size", "0", "intermediate_size is 0"),
        ("--max-memory-gib", "nan", "--max-memory-gib is nan"),
        ("--output-dir", f"{__file__}/results", "cannot be made (Not a directory)"),
        pytest.param(
            *("--device", "cuda", "torch sees no GPU"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(option: str, value: str, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", option, value])
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "cases, at most" not in result.stdout, "before anything is measured"


def test_files_of_results_are_tried_before_anything_is_measured(tmp_path: Path) -> None:
    kept, new, folder = tmp_path / "kept.md", tmp_path / "new.md", tmp_path / "folder.md"
    kept.write_text("what it holds")
    folder.mkdir()
    check_out([kept, new, None])
    assert kept.read_text() == "what it holds" and not new.exists()
    with pytest.raises(ValueError, match=r"--out is .*folder.md, which cannot be written \(Is a directory\)"):
        check_out([folder])
    check_folder("output-dir", tmp_path / "a" / "b", "benchmark.csv")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(ValueError, match="--threads is 0"):
        use_threads(0)


def test_base_models_are_measured_with_and_without_global_tokens() -> None:
    kinds, common = ["eff_longformer", "longformer", "bert", "modernbert"], {"task": "base", "optimizer": "sgd"}
    cases = make_cases(kinds, [32], sizes=[TINY], global_tokens=["none", "cls"], **common)
    for mode in ("forward", "train"):
        labels = [case.label for case in cases if case.mode == mode]
        assert labels[:4] == ["eff_longformer w=8, no global", "longformer w=8, no global", "bert", "modernbert w=8"]
        assert labels[4:] == ["eff_longformer w=8, CLS global", "longformer w=8, CLS global"]
    for result in run_cases(cases, WIDE, repeats=1):
        assert result.status == "ok" and result.seconds, result


def test_a_seed_gives_all_kinds_the_same_weights() -> None:
    ours = Case("eff_longformer", 40, "forward", TINY, task="base", global_tokens="cls")
    theirs, bert = replace(ours, kind="longformer"), replace(ours, kind="bert")
    first, second, third = (dict(build_model(case).named_parameters()) for case in (ours, theirs, bert))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert {name for name in first if name not in third} == {name for name in first if "_global." in name}
    positions = "embeddings.position_embeddings.weight"
    assert all(torch.equal(first[name], third[name]) for name in third if name != positions)
    assert torch.equal(first[positions][2:], third[positions])

    for task, chosen in (("base", "none"), ("base", "cls"), ("classification", "none"), ("classification", None)):
        case = replace(ours, task=task, global_tokens=chosen)
        assert output_difference(case, replace(case, kind="longformer")) < 1e-5
    assert output_difference(ours, replace(ours, global_tokens="none")) > 1e-3
    assert output_difference(ours, replace(ours, seed=1)) > 1e-1
    # A window that holds the whole input is BERT's attention.
    short = replace(ours, length=4, global_tokens="none")
    assert output_difference(short, replace(short, kind="bert")) < 1e-5


def test_global_tokens_reach_the_kinds_that_have_them() -> None:
    case = Case("eff_longformer", 16, size=TINY, task="base", global_tokens="cls")
    mask = build_inputs(case)["global_attention_mask"]
    assert mask[:, 0].eq(1).all() and mask.sum() == mask.shape[0]
    assert build_inputs(replace(case, task="classification", global_tokens="none"))["global_attention_mask"].sum() == 0
    assert build_inputs(replace(case, kind="bert")).keys() == {"input_ids"}
    with pytest.raises(ValueError, match="global_tokens is 'all'"):
        replace(case, global_tokens="all")
    with pytest.raises(ValueError, match="task is 'head'"):
        replace(case, task="head")


def test_models_that_should_be_equal_and_are_not_end_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_cases(["eff_longformer", "longformer", "bert"], [32, 64], sizes=[TINY], task="base")
    [(case, difference)] = check_outputs(cases)
    assert (case.kind, case.length, case.mode) == ("eff_longformer", 32, "forward") and difference < 1e-5
    assert check_outputs([case for case in cases if case.kind != "longformer"]) == []
    for wrong in (1e-2, float("nan")):
        monkeypatch.setattr("hf_efficient_attn.bench.agreement.output_difference", lambda *_, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="eff_longformer w=8 and longformer w=8 should be equal"):
            check_outputs(cases)


def test_models_that_do_not_run_are_told_where_they_are_measured() -> None:
    options = "--families longformer,eff_longformer --vocab-size 2 --lengths 16 --modes forward --hidden-size 16"
    result = CliRunner().invoke(app, ["bench", *options.split(), "--heads", "2", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert result.output.count("failed (") == 2


def test_ratios_of_made_up_results() -> None:
    kinds = ["eff_longformer", "longformer", "bert"]
    cases = make_cases(kinds, [1024, 4096], ["forward"], [TINY], ["none", "cls"], task="base")
    seconds = {("eff_longformer", "none"): 1.0, ("eff_longformer", "cls"): 1.25, ("longformer", "none"): 2.0}
    seconds |= {("longformer", "cls"): 2.0, ("bert", None): 3.0}
    results = []
    for case in cases:
        value = seconds[case.kind, case.global_tokens] * case.length / 1024
        times = [value, value, value * 1.5] if case.kind == "longformer" else [value] * 3
        results.append(Result(case, seconds=times, peak_bytes=int(value * 100), base_bytes=1))

    def lines(quantity: str, other: str, **target: float) -> list[str]:
        comparison = Comparison(quantity, "forward", 4096, "eff_longformer", other, **target)
        return [line.split(": ", 1)[1] for line in ratio_lines(results, [comparison])]

    assert lines("speed", "longformer", at_least=1.7, goal=2.0) == [
        "speed over longformer 2.00 (2.00 - 3.00); at least 1.7 (goal 2): met",
        "speed over longformer 1.60 (1.60 - 2.40); at least 1.7 (goal 2): not met",
    ]
    assert lines("memory", "longformer", at_most=0.5) == [
        "memory over longformer 0.50; at most 0.5: met",
        "memory over longformer 0.62; at most 0.5: not met",
    ]
    assert lines("time", "bert") == ["time over bert 0.33 (0.33 - 0.33)", "time over bert 0.42 (0.42 - 0.42)"]
    longer = lines("time", "eff_longformer", other_length=1024, at_most=4.3)
    assert longer == ["time over that at 1,024 tokens 4.00; at most 4.3: met"] * 2

    stopped = [replace(r, status="over memory", predicted=True) if r.case.kind == "bert" else r for r in results]
    faster = Comparison("speed", "forward", 4096, "eff_longformer", "bert", at_least=1.0)
    assert [line.split(": ")[1] for line in ratio_lines(stopped, [faster])] == [
        "speed over bert - (bert over memory, predicted)"
    ] * 2
    assert "at least" not in "".join(ratio_lines(results, [faster], targets=False))
    assert ratio_lines(results, [replace(faster, length=2048), replace(faster, mode="train")]) == []

    table = markdown_tables(results)
    assert "| 4,096 | eff_longformer, no global | 4.00 (4.00 - 4.00) | 1.00 | 0 | 1.00 |" in table
    assert "|  | bert | 12.0 (12.0 - 12.0) | 3.00 | 0 | 3.00 |" in table


def test_the_environment_line_has_no_path() -> None:
    line = environment_line("python b.py", ["--out", "/home/me/x.csv", "--out=/home/me/y.md", "--lengths", "1,2"], 1)
    assert line.endswith("1 CPU thread; python b.py --out x.csv --out=y.md --lengths 1,2")
    assert f"torch {torch.__version__}, transformers " in line


def test_the_longformer_benchmark_runs(tmp_path: Path) -> None:
    options = ["--quick", "--lengths", "128,256", "--repeats", "1", "--out", "r.csv", "--out", "r.md"]
    result = run_script("longformer", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("differs from longformer by at most") == 4  # before measuring, and at the end
    assert (
        "No ratio" in result.stdout
        and "one training step" in result.stdout
        and "modernbert: its default" in result.stdout
    )
    assert result.stdout.strip().endswith(f"python benchmarks/longformer.py {' '.join(options)}")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(rows) == 2 * 2 * 6 and {row["status"] for row in rows} == {"ok"}
    assert {row["optimizer"] for row in rows} == {"sgd"} and {row["global_tokens"] for row in rows} == {
        "none",
        "cls",
        "",
    }
    text = (tmp_path / "r.md").read_text()
    assert "### One forward pass" in text and str(tmp_path) not in text + result.stdout

    wrong = run_script("longformer", tmp_path, "--quick", "--out", "r.txt")
    assert wrong.returncode == 1 and wrong.stderr.strip() == (
        "Error: --out is r.txt, but it has to be a .csv, .md or .png file in a folder that exists."
    )


def test_the_longformer_benchmark_refuses_unequal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_efficient_attn.bench.agreement.output_difference", lambda *_: 0.5)
    result = CliRunner().invoke(script("longformer").app, ["--quick", "--lengths", "64", "--repeats", "1"])
    assert result.exit_code != 0 and "should be equal" in str(result.exception)
    assert "speed over" not in result.output and "median s" not in result.output


STUDIES = [path.stem for path in BENCHMARKS.glob("*.py") if hasattr(script(path.stem), "STUDY")]


@pytest.mark.parametrize("name", STUDIES)
def test_every_target_of_a_study_gets_its_line(name: str) -> None:
    study = script(name).STUDY
    assert study.script == name and set(study.kinds) <= set(KINDS)
    lengths = [int(length) for length in study.lengths.split(",")]
    cases = make_cases(study.kinds, lengths, study.modes, [TINY], study.global_tokens)
    results = [finished(case, 1.0, MIB) for case in cases]
    assert len(ratio_lines(results, study.targets)) == len(study.global_tokens) * len(study.targets) > 5


# Studies are data for one program; test_bench_generation.py has generation.
def test_a_study_runs_with_every_kind_there_is(tmp_path: Path) -> None:
    """One case a kind: lengths and modes are the same code in all, which the Longformer benchmark runs."""
    options = f"--quick --kinds {','.join(KINDS)} --lengths 128 --modes forward --repeats 1".split()
    result = run_script("families", tmp_path, *options, "--out", "r.csv", "--out", "r.png")
    assert result.stdout.count("differs from ") == 2 * sum(kind.same_as is not None for kind in KINDS.values())
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [row["kind"] for row in rows] == list(KINDS)
    assert {row["status"] for row in rows} == {"ok"}
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_the_window_benchmark_multiplies_what_it_says(tmp_path: Path) -> None:
    module = script("window_attention")
    query, key, value = torch.randn(3, 2, 32, 4, generator=torch.Generator().manual_seed(0))
    for backward in (False, True):
        out = module.products(query, key, value, block=8, keys=16, backward=backward)().view(2, 4, 8, 4)
        expected = query[:, 8:16] @ key[:, 8:24].mT @ value[:, 8:24]
        torch.testing.assert_close(out[:, 1], expected)
    assert module.multiply_adds(12, 4096, 513, 64, False) == 2 * 12 * 4096 * 513 * 64
    with pytest.raises(ValueError, match="length is 32.*multiple of 5"):
        module.products(query, key, value, block=5, keys=16, backward=False)

    options = "--length 128 --radius 16 --heads 2 --head-dim 8 --repeats 2 --blocks 32 --backward".split()
    result = run_script("window_attention", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert "useful products, 32 x 33" in result.stdout and "blocked products, 32 x 64" in result.stdout
    assert "python benchmarks/window_attention.py --length 128" in result.stdout
    wrong = run_script("window_attention", tmp_path, "--length", "100")
    assert wrong.returncode == 1 and wrong.stderr.startswith("Error: length is 100"), wrong.stderr


def test_big_birds_are_measured_in_blocks_and_alike() -> None:
    """One short input would turn transformers' into a model of full attention; it has no dropout in its blocks."""
    assert not KINDS["big_bird"].primes
    for kind in ("eff_big_bird", "big_bird"):
        model = build_model(Case(kind, 64, size=TINY))
        assert model.config.attention_type == "block_sparse"
        assert model.config.attention_probs_dropout_prob == 0
