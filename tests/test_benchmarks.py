"""The scripts of benchmarks/ that are no studies: a trial run of each, and what they count."""

from pathlib import Path

import pytest
import torch
from test_bench import finished, run_script, script

from hf_efficient_attn.bench import MIB, Case, ModelSize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_attention_alone_runs_against_its_products(dtype: str, tmp_path: Path) -> None:
    result = run_script("attention_alone", tmp_path, "--quick", "--dtype", dtype, "--out", "r.md")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "r.md").read_text()
    for name in ("softmax", "longformer", "big_bird", "nystromformer", "performer", "lsh"):
        assert f"| {name} | " in text
    assert "hashing" in text and "gathering" in text and f"batch 1, {dtype}: ms" in text
    wrong = run_script("attention_alone", tmp_path, "--length", "1000")
    assert wrong.returncode == 1 and "--length is 1000" in wrong.stderr
    wrong = run_script("attention_alone", tmp_path, "--dtype", "float16")
    assert wrong.returncode == 1 and "--dtype is 'float16'" in wrong.stderr


def test_the_attention_on_a_gpu_runs_on_a_cpu_for_a_trial(tmp_path: Path) -> None:
    options = ("--quick", "--device", "cpu", "--dtype", "float32", "--repeats", "1", "--tokens", "512")
    result = run_script("attention_gpu", tmp_path, *options, "--out", "r.md")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "r.md").read_text()
    for name in ("flash", "longformer", "big_bird", "nystromformer", "performer", "lsh", "neighborhood"):
        assert f"| 512 | {name} | " in text
    wrong = run_script("attention_gpu", tmp_path, "--device", "cpu", "--lengths", "100")
    assert wrong.returncode == 1 and "no multiple of 64" in wrong.stderr
    if not torch.cuda.is_available():
        wrong = run_script("attention_gpu", tmp_path)
        assert wrong.returncode == 1 and "torch sees no GPU" in wrong.stderr


def test_products_are_those_of_the_pairs() -> None:
    """Multiply-adds of the products, counted by torch, are those of the pairs that each mask admits."""
    module, length = script("attention_alone"), 1024
    rows = module.mechanisms(length, torch.float32)
    pairs = {
        "softmax": length**2,
        "longformer": length * 513,
        "big_bird": (length - 128) * 512 + 128 * length,
        "lsh": length * 128,
    }
    for name, count in pairs.items():
        done = 0
        for part in rows[name].products:
            if isinstance(part, module.Pairs):
                with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                    part.run(False, torch.float32)()
                done += counter.get_total_flops() // 2
        assert done == 2 * count * module.WIDTH, name
    products = [part for part in rows["performer"].products if isinstance(part, module.Product)]
    done = sum(part.rows * part.inner * part.columns * part.times for part in products)
    assert done == 4 * length * module.WIDTH * module.FEATURES, "features twice, sums of keys and values, results"
    for part in rows["performer"].products + rows["longformer"].products:
        flops = []
        for backward in (False, True):
            with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                part.run(backward, torch.float32)()
            flops.append(counter.get_total_flops())
        assert flops[1] == (1 + getattr(part, "gradients", 2)) * flops[0]


def test_the_profile_groups_every_operator(tmp_path: Path) -> None:
    module = script("profile_step")
    assert module.group_of("aten::bmm") == "batched products"
    assert module.group_of("aten::index_select") == "copies, gathering"
    assert module.group_of("aten::_softmax_backward_data") == "softmax"
    assert module.group_of("aten::never_heard_of") == module.OTHER
    seconds, found = module.shares("eff_performer", 64, 64)
    assert seconds > 0 and sum(found.values()) == pytest.approx(1.0) and found["linear layers"] > 0.05


def test_starting_up_is_timed_without_python() -> None:
    module = script("startup")
    assert 0 <= module.seconds_of("pass") < 0.5
    assert module.seconds_of("time.sleep(0.6)") > 0.6


def test_the_long_end_says_what_a_token_costs(tmp_path: Path) -> None:
    options = "--quick --kinds eff_performer --lengths 256 --parts forward --out r.md".split()
    result = run_script("long_end", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "r.md").read_text()
    assert "| 256 | eff_performer |" in text and "### Forward, last hidden state" in text

    module, size = script("long_end"), ModelSize(64, 2, 2, 256, 4096, attention_window=None)
    short, long = (Case("eff_performer", n, size=size, task="base") for n in (1000, 2000))
    cases = [make(["eff_performer"], 64, size) for make in (module.train_cases, module.deep_cases)]
    assert module._name(cases[0][0]) == "eff_performer, 2 layers, classification"
    assert module._name(cases[1][0]) == "eff_performer, 12 layers, masked_lm, gradient checkpointing"
    results = [finished(short, 1.0, 10 * MIB), finished(long, 2.4, 30 * MIB)]
    assert module.flatness(results) == ["- eff_performer, a token, 2,000 over 1,000 tokens: time 1.20, memory 1.50"]
    assert module.table(results)[-1] == "| 2,000 | eff_performer | 2.40 | 1200 | 30 | 15.4 | 0.3 | 0 |"
