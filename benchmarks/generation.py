"""Generation behind texts of 1,000 to 100,000 tokens: time of new tokens, and what the cache holds.

    python benchmarks/generation.py            # the whole table, a few minutes on two cores
    python benchmarks/generation.py --quick    # a trial run with a small model

Two layers of base size with a language model's head, greedy, one text at a time. The text is read at once before
anything is timed; each run is 16 new tokens. BERT with sdpa as a decoder keeps keys and values of all tokens.
"""

from hf_efficient_attn.bench import Comparison, Study, run_script, study_app


FAMILIES = ("eff_longformer", "eff_performer", "eff_reformer")
STUDY = Study(
    "generation",
    kinds=(*FAMILIES, "bert"),
    targets=tuple(
        Comparison(quantity, "generate", 100_000, kind, kind, other_length=1_000, at_most=bound)
        for kind in FAMILIES
        for quantity, bound in (("time", 1.3), ("memory", 1.0 if kind != "eff_reformer" else None))
    ),
    lengths="1000,10000,100000",
    quick_lengths="100,1000",
    modes=("generate",),
)
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
