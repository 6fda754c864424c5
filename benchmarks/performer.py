"""EffPerformer against BERT: time and peak memory of base-size layers.

    python benchmarks/performer.py            # the whole table, about 10 minutes on two cores
    python benchmarks/performer.py --quick    # a trial run with a small model

Two layers of base size with 256 random features, as `benchmarks/longformer.py` measures its own. The attention alone,
against performer-pytorch: `benchmarks/performer_attention.py`.
"""

from hf_efficient_attn.bench import PASSES, Comparison, Study, run_script, study_app


OURS, BERT = "eff_performer", "bert"
STUDY = Study(
    "performer",
    kinds=(OURS, BERT),
    targets=(
        *(
            Comparison("speed", mode, length, OURS, BERT, at_least=1.0)
            for length in (2048, 4096, 16384)
            for mode in PASSES
        ),
        *(Comparison("time", mode, 16384, OURS, OURS, other_length=4096, at_most=4.3) for mode in PASSES),
    ),
)
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
