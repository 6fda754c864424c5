"""All families against BERT with sdpa and ModernBERT, in one run: README's table is made of what this writes.

    python benchmarks/families.py            # the whole table, about 20 minutes on two cores
    python benchmarks/families.py --quick    # a trial run with a small model
    python benchmarks/readme_tables.py       # the results into README.md

Two layers of base size without a head, as `benchmarks/longformer.py` measures its own.
"""

from hf_efficient_attn.bench import PASSES, Comparison, Study, run_script, study_app


BERT = "bert"
FAMILIES = ("eff_longformer", "eff_big_bird", "eff_nystromformer", "eff_performer", "eff_reformer")
STUDY = Study(
    "families",
    kinds=(BERT, *FAMILIES, "modernbert"),
    targets=tuple(
        Comparison("speed", mode, length, kind, BERT)
        for kind in FAMILIES
        for length in (4096, 16384)
        for mode in PASSES
    ),
    lengths="512,4096,16384",
    quick_lengths="128,1024",
)
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
