"""Fine-tune a model that finds answers in long contexts, with Trainer.

    python examples/finetune_question_answering.py                            # no data needed, 168 s of CPU time
    python examples/finetune_question_answering.py --dataset questions.jsonl --answers-column answer
    python examples/finetune_question_answering.py --dataset squad --model my-checkpoint --max-length 4096

--dataset takes whatever `datasets.load_dataset` can read: columns with a question, a context and answers, which are
SQuAD's ({"text": [...], "answer_start": [...]}, none for a question without an answer), or one text or several that
stand in the context, or nothing. Without it the contexts are pieces of Python's standard library, and the questions ask
about the functions and classes in them. --model takes any folder or Hub name that AutoModelForQuestionAnswering can
load, of this package's families or another. Without it a small new model of --family is trained, with a tokenizer
trained on the contexts.

Contexts longer than --max-length are read in windows that overlap by --stride tokens. In the end QuestionAnswerer reads
the held-out contexts whole with the saved model. Prints exact match and F1 as SQuAD counts them, of the model and of
the context's line that has most words in common with the question.

On several GPUs: accelerate launch examples/finetune_question_answering.py ... On CPU cores shared with other programs
set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import re
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from hf_efficient_attn import QuestionAnswerer, recipes
from hf_efficient_attn.demo import questions_corpus, train_tokenizer


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(
        __doc__,
        output_dir="answerer",
        epochs=3,
        batch_size=8,
        learning_rate=2e-3,
        tuned_learning_rate=3e-5,
        max_length=384,
    )
    parser.data.add_argument("--question-column", default="question")
    parser.data.add_argument("--context-column", default="context")
    parser.data.add_argument("--answers-column", default="answers", help="as in SQuAD, or texts in the context")
    parser.data.add_argument(
        "--stride", type=recipes.count, default=128, help="tokens two windows share (default: 128)"
    )
    parser.data.add_argument("--max-answer-length", type=recipes.count, default=30, help="tokens (default: 30)")
    parser.add_family("AutoModelForQuestionAnswering")
    return parser.parse_args()


def answers_of(answers: Any, context: str) -> list[tuple[int, str]]:
    """Where each right answer begins in the context, and the answer; none for a question without one."""
    if answers is None or answers == "":
        return []
    texts = [answers] if isinstance(answers, str) else answers
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        places = [(context.find(text), text) for text in texts]
    elif isinstance(texts, dict) and {"answer_start", "text"} <= texts.keys():
        places = list(zip(texts["answer_start"], texts["text"], strict=True))
    else:
        raise ValueError(
            f"the answer {answers!r} is neither text, nor a list of texts, nor SQuAD's form: mend the rows."
        )
    for start, text in places:
        if start < 0 or context[start : start + len(text)] != text:
            raise ValueError(f"the answer {text!r} does not stand at character {start} of its context: mend the rows.")
    return places


def cut_windows(
    side: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Dataset | IterableDataset:
    """Each context as windows, every one after the question, with the places of the answer's first and last token.

    A window without the whole answer has the first token, which stands for "no answer".
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        questions = [question.strip() for question in batch[args.question_column]]
        longest = max(tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"], key=len)
        room = args.max_length - len(longest) - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= args.stride:
            raise ValueError(
                f"a question has {len(longest)} tokens, with which windows of {args.max_length} have room for "
                f"{max(0, room)} of the context and would share {args.stride}: shorten it, or give another "
                "--max-length or --stride."
            )
        encoding = tokenizer(
            questions,
            batch[args.context_column],
            truncation="only_second",
            max_length=args.max_length,
            stride=args.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows, offsets = encoding.pop("overflow_to_sample_mapping"), encoding.pop("offset_mapping")
        spans = []
        for window, row in enumerate(rows):
            places = answers_of(batch[args.answers_column][row], batch[args.context_column][row])
            start = places[0][0] if places else -1
            end = start + len(places[0][1]) if places else -1
            inside = [token for token, part in enumerate(encoding.sequence_ids(window)) if part == 1]
            spans.append((0, 0))
            if places and offsets[window][inside[0]][0] <= start and end <= offsets[window][inside[-1]][1]:
                first = max(token for token in inside if offsets[window][token][0] <= start)
                last = min(token for token in inside if offsets[window][token][1] >= end)
                spans[-1] = (first, last)
        starts, ends = ([span[side] for span in spans] for side in (0, 1))
        return {**encoding, "start_positions": starts, "end_positions": ends}

    return side.map(encode, batched=True, remove_columns=recipes.column_names(side))


def span_figures(prediction: EvalPrediction) -> dict[str, float]:
    """The share of windows of which first and last token of the answer are both right."""
    hits = [found == wanted for found, wanted in zip(prediction.predictions, prediction.label_ids, strict=True)]
    return {"windows": float(np.mean(hits[0] & hits[1]))}


def best_span(logits: tuple[Any, ...], labels: tuple[Any, ...]) -> tuple[Any, ...]:
    """The likeliest first and last token, all that the figures need."""
    return tuple(recipes.best_labels(side, label) for side, label in zip(logits[:2], labels, strict=True))


def nearest_line(question: str, context: str) -> str:
    """The line of the context with most words of the question."""
    words = set(re.findall(r"\w+", question.lower()))
    return max(context.splitlines() or [""], key=lambda line: len(words & set(re.findall(r"\w+", line.lower()))))


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[Trainer, str | None, Dataset]:
    """The Trainer, the checkpoint to go on from, and the held-out questions."""
    checkpoint = recipes.checkpoint_to_resume(args)
    arguments = recipes.training_arguments(
        args, best="windows", greater_is_better=True, label_names=["start_positions", "end_positions"]
    )
    with arguments.main_process_first():
        if args.dataset:
            sides = recipes.read_sides(args, eval_share=0.1)
            recipes.check_columns(
                sides, {"--question-column": args.question_column, "--context-column": args.context_column}
            )
            recipes.check_columns(sides, {"--answers-column": args.answers_column}, None, gaps=True)
            for column in (args.question_column, args.context_column):
                if blank := sum(
                    not text.strip() for side in sides if isinstance(side, Dataset) for text in side[column]
                ):
                    raise ValueError(f"column {column!r} is blank in {blank} rows: remove them.")
        else:
            sides = questions_corpus(max_characters=800, seed=args.seed)
            args.max_train_examples = args.max_train_examples or 2400
            args.max_eval_examples = args.max_eval_examples or 300
        train, held_out = recipes.limit_sides(args, *sides)
    tokenizer = recipes.load_tokenizer(
        checkpoint or args.model,
        lambda: train_tokenizer((row[args.context_column] for row in train.take(10_000)), 4096),
    )
    set_seed(args.seed)
    model = recipes.make_model(AutoModelForQuestionAnswering, args, arguments, tokenizer)
    args.stride = min(args.stride, args.max_length // 4)  # the question needs room as well
    with arguments.main_process_first():
        windows = [cut_windows(side, tokenizer, args) for side in (train, held_out)]
    if arguments.process_index == 0:
        print(
            f"{recipes.rows_of(train)} questions to learn, {recipes.rows_of(held_out)} held out; "
            f"{model.num_parameters():,} parameters; windows of at most {args.max_length} tokens"
        )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=windows[0],
        eval_dataset=windows[1],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=recipes.padding_step(args.max_length)),
        compute_metrics=span_figures,
        preprocess_logits_for_metrics=best_span,
    )
    return trainer, recipes.checkpoint_to_resume(args, model), held_out


def main() -> None:
    args = read_arguments()
    trainer, checkpoint, held_out = prepare(args)
    recipes.train_and_save(trainer, args, checkpoint, curves=("loss", "windows"))
    if not trainer.is_world_process_zero():
        return
    questions, contexts = held_out[args.question_column], held_out[args.context_column]
    wanted = [
        [text for _, text in answers_of(answers, context)]
        for answers, context in zip(held_out[args.answers_column], contexts, strict=True)
    ]
    answerer = QuestionAnswerer(str(args.output_dir), device=trainer.args.device)
    options = {"max_answer_length": args.max_answer_length, "allow_no_answer": not all(wanted)}
    found = answerer(list(questions), list(contexts), max_length=args.max_length, doc_stride=args.stride, **options)
    lines = [nearest_line(question, context) for question, context in zip(questions, contexts, strict=True)]
    scores = {
        "model": recipes.answer_scores([one["answer"] for one in found], wanted),
        "line": recipes.answer_scores(lines, wanted),
    }
    trainer.save_metrics("answers", {f"answers_{name}": value for name, value in scores["model"].items()})
    print("\nheld out         exact match      F1")
    for name, score in scores.items():
        print(f"  {name:14} {score['exact_match']:11.1%} {score['f1']:7.1%}")
    print(f"\n{questions[0]} --> {found[0]['answer']!r} (right: {wanted[0]})")
    print(f"\nModel, figures and training.png: {args.output_dir}. To use it:\n")
    print("    from hf_efficient_attn import QuestionAnswerer")
    print(f'    QuestionAnswerer("{args.output_dir}")(question="...", context="...")')


if __name__ == "__main__":
    main()
