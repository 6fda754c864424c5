"""EffLongformer against transformers' Longformer, BERT and ModernBERT: time and peak memory of base-size layers.

    python benchmarks/longformer.py                                    # the whole table, about 20 minutes on two cores
    python benchmarks/longformer.py --lengths 4096 --out results.md    # a part of it, also into a file
    python benchmarks/longformer.py --quick                            # a trial run with a small model

Two layers, hidden size 768, 12 heads, feed-forward 3,072, total window 512, batch 1, float32. First it checks that
models that should be equal are, with equal weights; if they are not, it ends there. Each case then runs in a process of
its own, and cases of one length take turns, so that noise hits all of them. Needs the extra `demo`.
"""

from hf_efficient_attn.bench import PASSES, Comparison, Study, run_script, study_app


OURS, IN_TREE, BERT, MODERN = "eff_longformer", "longformer", "bert", "modernbert"
STUDY = Study(
    "longformer",
    kinds=(OURS, IN_TREE, BERT, MODERN),
    targets=(
        Comparison("speed", "forward", 4096, OURS, IN_TREE, at_least=1.7, goal=2.0),
        Comparison("speed", "train", 4096, OURS, IN_TREE, at_least=1.5),
        Comparison("memory", "forward", 4096, OURS, IN_TREE, at_most=0.5),
        Comparison("memory", "train", 4096, OURS, IN_TREE, at_most=0.55),
        Comparison("speed", "forward", 4096, OURS, BERT, at_least=1.3),
        Comparison("speed", "train", 4096, OURS, BERT, at_least=3.0),
        *(Comparison("speed", mode, 4096, OURS, MODERN) for mode in PASSES),
        *(Comparison("time", mode, 1024, OURS, BERT, at_most=1.15) for mode in PASSES),
        *(Comparison("speed", mode, length, OURS, BERT, at_least=1.0) for length in (2048, 16384) for mode in PASSES),
        *(Comparison("time", mode, 16384, OURS, OURS, other_length=4096, at_most=4.3) for mode in PASSES),
    ),
    global_tokens=("none", "cls"),
)
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
