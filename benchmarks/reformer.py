"""EffReformer against transformers' Reformer and plain BERT.

    python benchmarks/reformer.py                                   # base-size layers, fifteen minutes on two cores
    python benchmarks/reformer.py --out results.csv --out results.md
    python benchmarks/reformer.py --quick                           # a small model, a minute

Two layers of base size, one local and one LSH, with chunks of 64 and one round of hashing, as
`benchmarks/longformer.py` measures. Outputs are not compared, because hash directions differ;
`tests/test_parity_reformer.py` does that with equal ones. Memory by depth: `benchmarks/reformer_depth.py`; against
reformer-pytorch: `benchmarks/reformer_peer.py`.
"""

from hf_efficient_attn.bench import PASSES, Comparison, Study, run_script, study_app


OURS, IN_TREE, BERT = "eff_reformer", "reformer", "bert"
TARGETS = (
    *(Comparison("speed", "forward", length, OURS, IN_TREE, at_least=1.0) for length in (4096, 16384)),
    *(Comparison("speed", "train", length, OURS, IN_TREE, at_least=1.15) for length in (4096, 16384)),
    *(Comparison("memory", mode, 4096, OURS, IN_TREE) for mode in PASSES),
    *(Comparison("speed", mode, length, OURS, BERT) for length in (4096, 16384) for mode in PASSES),
    *(Comparison("time", mode, 65536, OURS, OURS, 16384, at_most=4.6) for mode in PASSES),
)
STUDY = Study("reformer", (OURS, IN_TREE, BERT), TARGETS, lengths="4096,16384,65536")
app = study_app(STUDY)

if __name__ == "__main__":
    run_script(app)
