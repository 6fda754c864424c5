"""What the harness measures besides passes of classifiers: generation, other tasks, devices, crossovers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from causal_models import CAUSAL, FORMS, build
from helpers import random_ids
from test_bench import TINY, WIDE, finished
from transformers.cache_utils import Cache

from hf_efficient_attn.bench import KINDS, Case, make_cases, markdown_tables, plot, run_cases
from hf_efficient_attn.bench.crossover import find_crossovers
from hf_efficient_attn.bench.generation import Generation, cache_bytes
from hf_efficient_attn.bench.memory import CudaMeter, ResidentMeter, make_meter
from hf_efficient_attn.bench.models import NEW_TOKENS, ROOM, build_inputs, build_labels, build_model
from hf_efficient_attn.bench.prediction import extrapolate, predict
from hf_efficient_attn.bench.report import crossover_lines
from hf_efficient_attn.bench.step import build_step


GENERATING = [name for name, kind in KINDS.items() if kind.causal]


def test_every_causal_kind_generates_in_its_turn() -> None:
    cases = make_cases(GENERATING, [24], ["generate"], [TINY])
    for result in run_cases(cases, WIDE, repeats=3):
        assert (result.status, len(result.seconds)) == ("ok", 3), result
        assert 0 < result.peak_bytes < 2**20, "the cache's bytes, not the process's"


@pytest.mark.parametrize("kind", GENERATING)
def test_generation_is_that_of_generate(kind: str) -> None:
    case = Case(kind, 24, "generate", replace(TINY, attention_window=8))
    model, inputs = build_model(case).eval(), build_inputs(case)
    generation, tokens = Generation(model, inputs, 24), []
    generation.prepare()
    for _ in range(2):
        tokens.append(generation._token)
        generation.run(24)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS + 1, "eos_token_id": None, "pad_token_id": 0}
    right = model.generate(**inputs, **settings)
    assert torch.equal(right[:, 24:25], tokens[0])
    assert torch.equal(right[:, 24 + NEW_TOKENS :], tokens[1]), "the second run goes on where the first one ended"


def test_generation_reads_the_text_again_where_positions_end() -> None:
    case = Case("bert", 24, "generate", replace(TINY, attention_window=None))
    step = build_step(case)
    step.run(16)
    step.forget()
    step.prepare()
    for _ in range(ROOM // NEW_TOKENS + 1):
        step.run(24)
    keys_and_values = 2 * 4 * TINY.hidden_size * TINY.num_layers
    assert step.held() == (24 + NEW_TOKENS) * keys_and_values


def test_a_kind_without_causal_form_is_refused() -> None:
    with pytest.raises(ValueError, match="eff_big_bird has no causal form to generate with: choose among eff_longf"):
        Case("eff_big_bird", 24, "generate", TINY)


def test_bytes_of_a_cache_count_shared_memory_once() -> None:
    class Layer:
        def __init__(self, keys: torch.Tensor) -> None:
            self.keys, self.again, self.inner, self.number = keys, keys[1:], {"state": (torch.zeros(3), None)}, 4
            self.helper = SimpleNamespace(index=torch.zeros(2, dtype=torch.int32), layer=self)

    cache = Cache(layers=[Layer(torch.zeros(5, 2)), Layer(torch.zeros(7, dtype=torch.long))])
    assert cache_bytes(cache) == 4 * 5 * 2 + 8 * 7 + 2 * (4 * 3 + 4 * 2)


LONG = 100_000
STEADY = [(family, form) for family in CAUSAL for form in FORMS[family]]


@pytest.mark.parametrize(("family", "form"), STEADY)
def test_a_cache_takes_no_more_memory_a_token_at_100_000_than_at_1_000(family: str, form: str) -> None:
    """Constant for windows and states; LSH attention, which may attend anything, keeps every token, at one price."""
    config = {"max_position_embeddings": LONG + 16, "num_hidden_layers": 2}
    if family == "eff_reformer":
        config |= {"axial_pos_shape": [320, 320]}
    model = build(family, form, **config).eval()
    ids = random_ids(1, LONG)
    held = {}
    with torch.inference_mode():
        for length in (1_000, LONG):
            cache = model(input_ids=ids[:, :length], logits_to_keep=1).past_key_values
            step = model(input_ids=ids[:, :1], past_key_values=cache)
            assert step.logits.isfinite().all()
            held[length] = cache_bytes(step.past_key_values)
    if family == "eff_reformer" and form != "local":
        assert held[LONG] - held[1_000] <= (LONG - 1_000) * held[1_000] / 1_000
    else:
        assert held[LONG] == held[1_000]


def test_masked_lm_has_labels_and_no_logits() -> None:
    case = Case("eff_nystromformer", 200, "train", replace(TINY, attention_window=None), task="masked_lm")
    labels = build_labels(case)
    share = (labels != -100).float().mean()
    assert labels.shape == (1, 200) and 0.08 < share < 0.25
    model = build_model(case).train()
    outputs = model(**build_inputs(case), labels=labels)
    assert model.config.skip_logits and outputs.logits is None and outputs.loss > 0


def test_tasks_and_checkpointing_are_measured() -> None:
    cases = [
        Case("eff_performer", 32, "train", replace(TINY, attention_window=None), task="masked_lm", checkpointing=True),
        Case("bert", 32, "train", replace(TINY, attention_window=None), task="masked_lm"),
        Case("bert", 32, "forward", replace(TINY, attention_window=None), task="masked_lm"),
    ]
    assert [result.status for result in run_cases(cases, WIDE, repeats=1)] == ["ok"] * 3
    model = build_model(cases[0])
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_tokens_a_pass_make_the_batches() -> None:
    cases = make_cases(["eff_longformer"], [16, 32, 128], ["train"], [TINY], tokens=64)
    assert [case.batch_size for case in cases] == [4, 2, 1]
    assert len({case.series for case in cases}) == 1
    bounds = replace(WIDE, seconds=10.0)
    short = finished(cases[0], 4.0, 2**20)
    assert predict(cases[1], [short], bounds) is None, "as many tokens take as long"
    assert predict(cases[2], [short], bounds) is None
    assert predict(replace(cases[2], batch_size=2), [short], bounds).verdict == "over time, predicted"


def test_a_compiled_model_is_measured() -> None:
    (result,) = run_cases([Case("bert", 16, "forward", replace(TINY, attention_window=None), compiled=True)], WIDE)
    assert result.status == "ok", result
    with pytest.raises(ValueError, match="generate is not measured compiled"):
        Case("bert", 16, "generate", replace(TINY, attention_window=None), compiled=True)


def test_each_device_has_its_meter() -> None:
    assert isinstance(make_meter("cpu"), ResidentMeter)
    assert isinstance(make_meter("cuda"), CudaMeter)
    with pytest.raises(ValueError, match="device is 'tpu'.*cpu, cuda"):
        Case("bert", 8, device="tpu", size=replace(TINY, attention_window=None))


def test_dropout_of_attention_may_be_chosen_for_all() -> None:
    for kind in ("bert", "eff_longformer", "eff_reformer", "modernbert"):
        size = TINY if KINDS[kind].windowed else replace(TINY, attention_window=None)
        config = build_model(Case(kind, 64, size=size, attention_dropout=0.25)).config
        assert [getattr(config, name) for name in KINDS[kind].dropout_fields] == [0.25] * len(
            KINDS[kind].dropout_fields
        )
    with pytest.raises(ValueError, match="attention_dropout is 1.0, which is no probability below 1"):
        Case("eff_longformer", 64, size=TINY, attention_dropout=1.0)


def test_predictions_of_generation_grow_with_the_cache_alone() -> None:
    bert = Case("bert", 4000, "generate", replace(TINY, attention_window=None))
    assert extrapolate([(1000, 1.0), (2000, 1.5)], bert) == pytest.approx(3.0)
    windowed = Case("eff_longformer", 4000, "generate", TINY)
    assert extrapolate([(1000, 1.0), (2000, 1.1)], windowed) == pytest.approx(1.1)


def made_up(times: dict[str, dict[int, float]], mode: str = "forward") -> list:
    cases = make_cases(times, sorted({n for row in times.values() for n in row}), [mode], [TINY])
    return [finished(case, times[case.kind][case.length], 2**20) for case in cases if case.length in times[case.kind]]


def test_what_does_not_go_together_is_refused() -> None:
    bert = {"kind": "bert", "length": 8, "size": replace(TINY, attention_window=None)}
    assert Case(mode="generate", task="base", **bert).task == "causal_lm"
    with pytest.raises(ValueError, match="task is 'causal_lm', which is that of generation"):
        Case(mode="train", task="causal_lm", **bert)
    with pytest.raises(ValueError, match="checkpointing is for training"):
        Case(mode="forward", checkpointing=True, **bert)
    both = make_cases(["bert"], [8], ["forward", "train"], [TINY], checkpointing=True)
    assert [case.checkpointing for case in both] == [False, True]
    with pytest.raises(ValueError, match="no kinds are given"):
        make_cases([], [8])
    with pytest.raises(ValueError, match="no modes are given"):
        make_cases(["bert"], [8], [])


def test_a_gpus_memory_is_not_predicted_from_that_of_the_machine() -> None:
    short = Case("bert", 1024, "train", replace(TINY, attention_window=None), device="cuda")
    bounds = replace(WIDE, memory_bytes=2**30)
    results = [finished(short, 0.01, 500 * 2**20)]
    assert predict(replace(short, length=4096), results, bounds) is None
    results = [finished(replace(short, device="cpu"), 0.01, 500 * 2**20)]
    assert predict(replace(short, length=4096, device="cpu"), results, bounds).verdict == "over memory, predicted"


def test_the_baseline_is_bert_where_it_is_there() -> None:
    times = {"modernbert": {8: 2.0}, "eff_performer": {8: 1.0}, "bert": {8: 3.0}}
    assert {found.baseline.kind for found in find_crossovers(made_up(times), "forward")} == {"bert"}
    assert crossover_lines(made_up({"eff_performer": {8: 1.0, 16: 1.99}, "bert": {8: 2.0, 16: 2.0}})) == [
        "forward pass: eff_performer is not quicker than bert at the longest text measured of both"
    ], "half a percent may be noise"


def test_crossovers_are_interpolated_on_logarithmic_axes() -> None:
    # Time 4 n against n^2, less the 2 % that may be noise: equal at 4; measured at 2 and 8.
    line, square = {2: 8.0, 8: 32.0}, {2: 4.0 / 0.98, 8: 64.0 / 0.98}
    (found,) = find_crossovers(made_up({"eff_longformer": line, "bert": square}), "forward")
    assert found.length == pytest.approx(4.0) and found.seconds == pytest.approx(16.0)
    assert not found.everywhere and (found.series.kind, found.baseline.kind) == ("eff_longformer", "bert")


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({1000: 3.0, 2000: 1.0, 4000: 1.0}, "from about 1,200 tokens on"),
        ({1000: 1.0, 2000: 1.0, 4000: 1.0}, "at every length measured, from 1,000 tokens on"),
        ({1000: 1.0, 2000: 9.0, 4000: 9.0}, "is not quicker than bert at the longest text"),
        ({1000: 1.0, 2000: 9.0, 4000: 1.0}, "from about 2,700 tokens on"),
    ],
)
def test_crossovers_in_words_and_in_the_plot(ours: dict[int, float], said: str, tmp_path: Path) -> None:
    results = made_up({"eff_performer": ours, "bert": {1000: 2.0, 2000: 3.0, 4000: 4.0}})
    (line,) = crossover_lines(results)
    assert said in line and line.startswith("forward pass: eff_performer")
    assert f"- {line}" in markdown_tables(results)
    assert plot(results, tmp_path / "plot.png").stat().st_size > 10_000


def test_without_a_quadratic_kind_or_a_common_length_there_is_none() -> None:
    assert crossover_lines(made_up({"eff_longformer": {8: 1.0}, "eff_performer": {8: 2.0}})) == []
    assert crossover_lines(made_up({"eff_longformer": {8: 1.0}, "bert": {16: 2.0}})) == []
