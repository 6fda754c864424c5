"""The demo: an EffLongformer classifier of long documents, trained, saved, checked and measured in a few minutes.

Its parts are for use elsewhere too: `stdlib_corpus` needs no download, `finetune` trains on any `Corpus`.
"""

from .corpus import Corpus, SourceFile, cap_per_label, cut_documents, read_packages, split_by_file, stdlib_corpus
from .run import QUICK, DemoReport, DemoSettings, run_demo
from .sources import load_sides
from .tokenizer import train_tokenizer
from .training import TimeLimit, accuracy, finetune, small_config, tokenize_texts


__all__ = [
    "QUICK",
    "Corpus",
    "DemoReport",
    "DemoSettings",
    "SourceFile",
    "TimeLimit",
    "accuracy",
    "cap_per_label",
    "cut_documents",
    "finetune",
    "load_sides",
    "read_packages",
    "run_demo",
    "small_config",
    "split_by_file",
    "stdlib_corpus",
    "tokenize_texts",
    "train_tokenizer",
]
