"""ListOps: the grammar and its labels against an evaluator of another kind, and the benchmark that trains on it."""

from __future__ import annotations

import ast
import csv
import math
import statistics
import subprocess
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_bench import run_script, script
from typer.testing import CliRunner

from hf_efficient_attn import FAMILIES
from hf_efficient_attn.demo import LISTOPS_OPERATORS, ListOpsExample, draw_listops, listops_tokenizer


def nested(tokens: tuple[str, ...]) -> object:
    """The expression as nested lists, read by Python: `["MAX", 2, ["MIN", 4, 7]]`."""
    text = " ".join(tokens).replace("[", '["').replace(" ]", "],")
    for name in ("MIN", "MAX", "MED", "SM"):
        text = text.replace(f'["{name}', f'["{name}",')
    for digit in "0123456789":
        text = text.replace(f" {digit}", f" {digit},")
    return ast.literal_eval(text.rstrip(","))


def value_of(tree: object) -> int:
    """By the definitions of the paper."""
    if isinstance(tree, int):
        return tree
    name, *arguments = tree
    values = [value_of(argument) for argument in arguments]
    return {
        "MIN": lambda: sorted(values)[0],
        "MAX": lambda: sorted(values)[-1],
        "MED": lambda: math.floor(statistics.median(values)),
        "SM": lambda: int(str(sum(values))[-1]),
    }[name]()


def depth_of(tree: object) -> int:
    return 1 if isinstance(tree, int) else 1 + max(depth_of(argument) for argument in tree[1:])


def arguments_in(tree: object) -> list[int]:
    """How many arguments each operation has."""
    if isinstance(tree, int):
        return []
    return [len(tree) - 1, *(count for argument in tree[1:] for count in arguments_in(argument))]


def draw(count: int, *args: int, **kwargs: int) -> list[ListOpsExample]:
    return list(islice(draw_listops(*args, **kwargs), count))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),  # figure 1 of the paper
        ("[MED 3 8 ]", 5),
        ("[MED 9 1 4 ]", 4),
        ("[SM 9 9 [MAX 1 5 ] ]", 3),
    ],
)
def test_the_evaluator_of_this_test(text: str, value: int) -> None:
    assert value_of(nested(tuple(text.split()))) == value


def test_labels_are_the_values() -> None:
    examples = draw(300, 30, 300, seed=1) + draw(20, 500, 2000, seed=2) + draw(20, 1, 12, seed=3)
    assert all(example.label == value_of(nested(example.tokens)) for example in examples)
    used = {token for example in examples for token in example.tokens}
    assert used == {*map(str, range(10)), *LISTOPS_OPERATORS, "]"}


def test_expressions_keep_the_limits() -> None:
    examples = draw(400, 20, 80, seed=4, max_depth=5, max_args=6)
    trees = [nested(example.tokens) for example in examples]
    lengths = [len(example.tokens) for example in examples]
    assert 20 <= min(lengths) < 24 and 70 < max(lengths) <= 80
    depths = [depth_of(tree) for tree in trees]
    assert max(depths) == 5 and min(depths) >= 3
    arguments = Counter(count for tree in trees for count in arguments_in(tree))
    assert set(arguments) == {2, 3, 4, 5, 6}
    # The published sizes: ten levels, ten arguments, 500 to 2,000 tokens.
    published = draw(60, seed=5)
    trees = [nested(example.tokens) for example in published]
    assert max(map(depth_of, trees)) == 10
    assert {count for tree in trees for count in arguments_in(tree)} == set(range(2, 11))
    assert all(500 <= len(example.tokens) <= 2000 for example in published)


def test_lengths_at_the_edges_are_kept() -> None:
    """The longest and the shortest expression that a range admits do occur, and nothing beyond."""
    assert {len(example.tokens) for example in draw(200, 5, 6, seed=6)} == {5, 6}
    assert sorted(example.tokens for example in draw(10, 1, 3)) == [(str(digit),) for digit in range(10)]


def test_shares_are_those_of_the_grammar() -> None:
    """Where no length is refused: a quarter operations, and everything else uniform."""
    examples = draw(3000, 4, 100_000, seed=7, max_depth=3)
    operators = Counter(token for example in examples for token in example.tokens if token.startswith("["))
    digits = Counter(token for example in examples for token in example.tokens if token.isdigit())
    assert all(0.23 < count / operators.total() < 0.27 for count in operators.values()) and len(operators) == 4
    assert all(0.09 < count / digits.total() < 0.11 for count in digits.values()) and len(digits) == 10
    # Below the root one level may hold operations: of its places a quarter do, on average.
    places = [argument for example in examples for argument in nested(example.tokens)[1:]]
    assert 0.23 < sum(isinstance(place, list) for place in places) / len(places) < 0.27


def test_a_seed_gives_the_same_examples_and_no_example_twice() -> None:
    first = draw(500, 20, 60, seed=8)
    assert first == draw(500, 20, 60, seed=8) and first[:50] == draw(50, 20, 60, seed=8)
    assert first != draw(500, 20, 60, seed=9)
    assert len({example.tokens for example in first}) == 500
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(10, 20, 60)
    assert torch.equal(before, torch.get_rng_state())


def test_the_examples_of_a_seed_stay_what_they_are() -> None:
    """In every version of Python, and in every version of this package that does not say otherwise."""
    assert [(" ".join(tokens), label) for tokens, label in draw(3, 8, 14)] == EXAMPLES_OF_SEED_0


EXAMPLES_OF_SEED_0 = [("[MED 0 8 8 9 3 2 8 ]", 8), ("[MED 7 4 4 8 1 6 ]", 5), ("[MIN 0 9 4 0 1 8 ]", 0)]


def test_labels_are_spread() -> None:
    """No label is rare, 0 and 9 are frequent: minima and maxima of many digits."""
    counts = Counter(example.label for example in draw(2000, 100, 256, seed=10))
    assert set(counts) == set(range(10)) and min(counts.values()) > 80
    assert {label for label, _ in counts.most_common(2)} == {0, 9} and max(counts.values()) < 500


def test_what_there_is_not() -> None:
    for lengths in ((0, 10), (20, 10)):
        with pytest.raises(ValueError, match=f"lengths are {lengths[0]} to {lengths[1]}"):
            draw_listops(*lengths)
    with pytest.raises(ValueError, match="max_depth is 10 and max_args 1"):
        draw_listops(max_args=1)
    with pytest.raises(ValueError, match="no new expression of 2 to 3 tokens.*after 0"):
        next(draw_listops(2, 3))
    with pytest.raises(ValueError, match="no new expression of 1 to 1 tokens.*after 10"):
        draw(11, 1, 1)


def test_the_tokenizer_has_an_id_for_each_token(tmp_path: Path) -> None:
    tokenizer = listops_tokenizer(50)
    example = next(draw_listops(20, 40))
    ids = tokenizer(" ".join(example.tokens))["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *example.tokens]
    assert len(tokenizer) == 3 + 10 + 4 + 1 and tokenizer.pad_token_id == 0
    assert len(tokenizer(" ".join(["1"] * 60), truncation=True)["input_ids"]) == 50
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(" ".join(example.tokens))["input_ids"] == ids


TINY = "--steps 2 --lengths 10,30 --device cpu".split()


def run_benchmark(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_script("lra", folder, *TINY, *options)


def test_the_benchmark_trains_every_text_family(tmp_path: Path) -> None:
    result = run_benchmark(tmp_path, "--out", "r.csv", "--out", "r.md")
    assert result.returncode == 0, result.stderr
    text = {name for name, row in FAMILIES.items() if row.tokenizer is not None}
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert rows[0]["model"] == "softmax (eff_electra)"
    assert {row["model"].removeprefix("softmax (").removesuffix(")") for row in rows} == text
    assert all(0 <= float(row["accuracy"].split("%")[0]) <= 60 and float(row["s a step"]) > 0 for row in rows)
    published = {row["model"]: (row["LRA"], row["re-run"]) for row in rows}
    assert published["softmax (eff_electra)"] == ("36.37", "37.10") and published["eff_big_bird"] == ("36.05", "-")
    table = (tmp_path / "r.md").read_text()
    assert all(f"| {row['model']} | {row['accuracy']} |" in table for row in rows)
    for said in ("10 to 30 tokens", "this is a shorter task", "the most frequent label", "2 steps of 32", "float32"):
        assert said in table and said in result.stdout
    assert "step 2 of 2" in result.stdout
    assert result.stdout.strip().endswith(f"python benchmarks/lra.py {' '.join([*TINY, '--out r.csv --out r.md'])}")


def test_a_run_does_not_depend_on_the_other_models() -> None:
    """Alone or beside others, a model learns the same; dropout is on in this budget."""
    module = script("lra")
    found = []
    for families in (["eff_performer"], ["eff_big_bird", "eff_performer"]):
        budget = module.chosen_budget("cpu", 3, "10,30")
        budget.options["hidden_dropout_prob"] = 0.1
        rows, labels = module.encode(draw(96, 10, 30))
        runners = {}
        for family in families:
            model = module.build(family, budget, 0).train()
            runners[family] = module.Runner(model, torch.optim.AdamW(model.parameters()), [], [])
        module.train(runners, rows, labels, budget, torch.device("cpu"), 0)
        found.append(runners["eff_performer"].losses)
    assert found[0] == found[1] and len(set(found[0])) == 3


def test_models_of_a_budget_are_of_one_size() -> None:
    module = script("lra")
    for name in module.BUDGETS:
        budget = module.chosen_budget(name, 1, None)
        configs = [module.build(family, budget, 0).config for family in module.TEXT_FAMILIES]
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
            assert len({getattr(config, field) for config in configs}) == 1
        assert all(config.max_input_length >= budget.lengths[1] + 1 for config in configs)
        assert all(config.embedding_size in (None, config.hidden_size) for config in configs)


def test_the_guess_from_the_first_operator() -> None:
    examples = [ListOpsExample(("[MIN",), 0)] * 3 + [ListOpsExample(("[MAX",), 9)] * 2
    assert script("lra").guesses(examples, examples) == (0.6, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--families eff_vit", "--families has 'eff_vit': choose from"),
        ("--families ,", "--families is ','"),
        ("--budget large", "--budget is 'large': choose one of cpu, paper."),
        ("--steps 0", "--steps is 0"),
        ("--lengths 10", "--lengths is '10': give two numbers"),
        ("--lengths 30,10", "lengths are 30 to 10"),
        ("--out r.txt", "--out is r.txt"),
    ],
)
def test_wrong_options_are_said(options: str, message: str) -> None:
    result = CliRunner().invoke(script("lra").app, [*TINY, *options.split()])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
