"""The measuring harness: bounds hold, what they stop is reported and the run goes on, predictions are right."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_efficient_attn.bench import (
    GIB,
    MIB,
    Bounds,
    Case,
    ModelSize,
    Result,
    available_bytes,
    describe,
    make_cases,
    plot,
    print_tables,
    run_cases,
    write_csv,
)
from hf_efficient_attn.bench.memory import PeakMemory, resident_bytes
from hf_efficient_attn.bench.prediction import extrapolate, predict
from hf_efficient_attn.cli import app


TINY = ModelSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, vocab_size=64, attention_window=8)
WIDE = Bounds(seconds=60.0, memory_bytes=8 * GIB)


def finished(case: Case, seconds: float, peak: int, base: int = 300 * MIB) -> Result:
    return Result(case, seconds=[seconds] * 3, peak_bytes=peak, base_bytes=base)


def test_every_kind_and_mode_is_measured_in_its_turn() -> None:
    cases = make_cases(["eff_longformer", "longformer", "bert"], [32], sizes=[TINY])
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
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(option: str, value: str, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", option, value])
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
