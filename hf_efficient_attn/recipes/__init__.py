"""What training scripts share, so that each of `examples/` shows its task and nothing else.

Options spelled alike, both sides of any data set, streams among them, `TrainingArguments`, the point to go on from,
figures and curves. Plain functions around transformers' Trainer; use what fits.
"""

from .models import make_model
from .options import RecipeParser, count, errors_in_one_line, positive, share
from .rows import CollatorOfSides, continue_texts, cut_texts, pack, padding_step
from .scores import answer_scores, best_labels, label_f1, token_figures, token_sums
from .sides import check_columns, column_names, labels_like, limit_sides, load_tokenizer, read_sides, read_texts
from .training import checkpoint_to_resume, rows_of, train_and_save, training_arguments


__all__ = [
    "CollatorOfSides",
    "RecipeParser",
    "answer_scores",
    "best_labels",
    "check_columns",
    "checkpoint_to_resume",
    "column_names",
    "continue_texts",
    "count",
    "cut_texts",
    "errors_in_one_line",
    "label_f1",
    "labels_like",
    "limit_sides",
    "load_tokenizer",
    "make_model",
    "pack",
    "padding_step",
    "positive",
    "read_sides",
    "read_texts",
    "rows_of",
    "share",
    "token_figures",
    "token_sums",
    "train_and_save",
    "training_arguments",
]
