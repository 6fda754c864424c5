"""EffBigBird against transformers' BigBird and BERT: time and peak memory of base-size layers.

    python benchmarks/big_bird.py            # the whole table, about 15 minutes on two cores
    python benchmarks/big_bird.py --quick    # a trial run with a small model

Two layers of base size with blocks of 64 tokens and 3 random ones, as `benchmarks/longformer.py` measures its own. The
outputs are not compared, because the random blocks differ; `tests/test_parity_big_bird.py` does that with equal ones.
"""

from hf_efficient_attn.bench import PASSES, Comparison, Study, run_script, study_app


OURS, IN_TREE, BERT = "eff_big_bird", "big_bird", "bert"
STUDY = Study(
    "big_bird",
    kinds=(OURS, IN_TREE, BERT),
    targets=(
        Comparison("speed", "forward", 4096, OURS, IN_TREE, at_least=1.9),
        Comparison("speed", "train", 4096, OURS, IN_TREE, at_least=1.4),
        Comparison("memory", "forward", 4096, OURS, IN_TREE, at_most=0.3),
        Comparison("memory", "train", 4096, OURS, IN_TREE, at_most=0.5),
        *(Comparison("speed", mode, length, OURS, BERT) for length in (2048, 4096) for mode in PASSES),
        *(Comparison("time", mode, 16384, OURS, OURS, other_length=4096, at_most=4.3) for mode in PASSES),
    ),
)
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
