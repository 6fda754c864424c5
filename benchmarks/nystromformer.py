"""EffNystromformer against transformers' Nystromformer and BERT: time and peak memory of base-size layers.

    python benchmarks/nystromformer.py            # the whole table, about 10 minutes on two cores
    python benchmarks/nystromformer.py --quick    # a trial run with a small model

Two layers of base size with 64 landmarks, as `benchmarks/longformer.py` measures its own; outputs with equal weights
are compared first.
"""

from hf_efficient_attn.bench import PASSES, Comparison, Study, run_script, study_app


OURS, IN_TREE, BERT = "eff_nystromformer", "nystromformer", "bert"
STUDY = Study(
    "nystromformer",
    kinds=(OURS, IN_TREE, BERT),
    targets=(
        *(Comparison("speed", mode, 4096, OURS, IN_TREE, at_least=1.1) for mode in PASSES),
        *(Comparison("memory", mode, 4096, OURS, IN_TREE, at_most=0.7) for mode in PASSES),
        *(Comparison("speed", mode, length, OURS, BERT) for length in (2048, 4096) for mode in PASSES),
        *(Comparison("time", mode, 16384, OURS, OURS, other_length=4096, at_most=4.3) for mode in PASSES),
    ),
)
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
