"""Mechanisms inside transformers' BERT, and families of ours, against BERT with sdpa: time and peak memory.

    python benchmarks/inside.py            # the whole table, about 10 minutes on two cores
    python benchmarks/inside.py --quick    # a trial run with a small model

Two layers of base size, as `benchmarks/longformer.py` measures its own. The models `bert_...` are transformers' own
BERT with `attn_implementation="eff:..."`; `eff_...` are families of ours, to which a BERT can be converted.
"""

from hf_efficient_attn.bench import PASSES, Comparison, Study, run_script, study_app


BERT = "bert"
INSIDE = ("bert_nystrom", "bert_sliding_window", "bert_block_sparse", "bert_performer", "bert_lsh")
FAMILIES = ("eff_nystromformer", "eff_longformer")
STUDY = Study(
    "inside",
    kinds=(*INSIDE, *FAMILIES, BERT),
    targets=tuple(
        Comparison("speed", mode, length, kind, BERT) for kind in INSIDE for length in (4096, 16384) for mode in PASSES
    ),
    lengths="512,4096,16384",
    quick_lengths="512,2048",
)
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
