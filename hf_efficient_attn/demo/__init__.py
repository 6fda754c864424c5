"""The demo: an EffLongformer classifier of long documents, trained, saved, checked and measured in a few minutes.

Its parts are for use elsewhere too: `stdlib_corpus` and `english_corpus` need no download, `finetune` trains on any
`Corpus`, `pack_texts` makes blocks to pretrain on, `draw_listops` examples of any length with exact answers.
"""

from .baselines import bag_of_tokens_accuracy
from .corpus import Corpus, SourceFile, cap_per_label, cut_documents, read_packages, split_by_file, stdlib_corpus
from .english import EnglishCorpus, english_corpus
from .listops import LISTOPS_OPERATORS, ListOpsExample, draw_listops, listops_tokenizer
from .names import ROLES, label_names, names_corpus
from .questions import questions_corpus
from .run import QUICK, DemoReport, DemoSettings, run_demo
from .sources import load_sides
from .tokenizer import train_tokenizer, train_wordpieces
from .training import TimeLimit, accuracy, finetune, pack_texts, small_config, tokenize_texts


__all__ = [
    "LISTOPS_OPERATORS",
    "QUICK",
    "ROLES",
    "Corpus",
    "DemoReport",
    "DemoSettings",
    "EnglishCorpus",
    "ListOpsExample",
    "SourceFile",
    "TimeLimit",
    "accuracy",
    "bag_of_tokens_accuracy",
    "cap_per_label",
    "cut_documents",
    "draw_listops",
    "english_corpus",
    "finetune",
    "label_names",
    "listops_tokenizer",
    "load_sides",
    "names_corpus",
    "pack_texts",
    "questions_corpus",
    "read_packages",
    "run_demo",
    "small_config",
    "split_by_file",
    "stdlib_corpus",
    "tokenize_texts",
    "train_tokenizer",
    "train_wordpieces",
]
