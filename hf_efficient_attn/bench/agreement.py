"""Do models that should be equal give equal outputs? A ratio between two that do not means nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .cases import Case
from .kinds import KINDS
from .models import build_inputs, build_model


def output_difference(first: Case, second: Case) -> float:
    """The largest difference between two cases' outputs in eval mode: logits, or last hidden states."""
    import torch

    outputs = []
    for case in (first, second):
        model = build_model(case).eval()
        with torch.inference_mode():
            outputs.append(model(**build_inputs(case))[0].float().cpu())
    return (outputs[0] - outputs[1]).abs().max().item()


def check_outputs(cases: Iterable[Case], *, length: int = 1024, tolerance: float = 1e-4) -> list[tuple[Case, float]]:
    """Compare the kinds that should be equal (`Kind.same_as`), where both are among the cases.

    Args:
        cases: what is to be measured.
        length: tokens to compare at; less where the shortest case has less.
        tolerance: the largest difference that is only rounding in float32, which they are compared in.

    Returns:
        One pair for each comparison: the case of the one kind, and its largest difference from the other. There is none
        of models that do not run.

    Raises:
        ValueError: a difference above the tolerance, or NaN.
    """
    cases = list(cases)
    kinds = {case.kind for case in cases}
    length = min([length, *(case.length for case in cases)])
    # Where it is least noisy, whatever it is measured in.
    common = {"length": length, "batch_size": 1, "mode": "forward", "dtype": "float32", "device": "cpu"}
    common |= {"checkpointing": False, "compiled": False}
    chosen = {replace(case, **common): None for case in cases if KINDS[case.kind].same_as in kinds}
    found = []
    for case in chosen:
        other = replace(case, kind=KINDS[case.kind].same_as)
        try:
            difference = output_difference(case, other)
        except Exception:  # one that cannot run is told where it is measured
            continue
        if not difference <= tolerance:
            raise ValueError(
                f"{case.label} and {other.label} should be equal, but with equal weights their outputs differ by "
                f"{difference:.1e} at {length:,} tokens (allowed: {tolerance:.0e}), so no ratio between them is given."
            )
        found.append((case, difference))
    return found
