"""Pretrain an ELECTRA: a generator and a discriminator together, on any text.

    python examples/pretrain_electra.py                                    # Python's own documentation, a few minutes
    python examples/pretrain_electra.py --dataset my-texts.txt --size small --max-steps 100000 --output-dir my-electra
    python examples/pretrain_electra.py --dataset my/dataset --tokenizer bert-base-uncased --family eff_nystromformer
    python examples/pretrain_electra.py --output-dir my-electra --resume

--dataset takes whatever `datasets.load_dataset` can read. Without it the text is the English that ships with Python:
its documentation and the docstrings of its standard library. A WordPiece vocabulary is trained on it, unless
--tokenizer names one. --size is one of the published ones with their hyperparameters, or `tiny`. --family is any
encoder of this package. --model goes on with what this example saved, or with a discriminator and its --generator.
Writes the joint model, the curves (training.csv and training.png), the discriminator (to fine-tune with
examples/finetune_classification.py --model OUT/discriminator --layer-decay 0.8) and the generator.

On several GPUs: accelerate launch examples/pretrain_electra.py ... On CPU cores shared with other programs set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import time
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

import hf_efficient_attn
from hf_efficient_attn import (
    ELECTRA_SIZES,
    FAMILIES,
    DataCollatorForReplacedTokenDetection,
    EffElectraForJointPreTraining,
    EffElectraJointConfig,
    ElectraTrainer,
    recipes,
)
from hf_efficient_attn.demo import pack_texts, train_wordpieces


# A model for trying things out on two cores.
TINY = {"num_hidden_layers": 3, "hidden_size": 128, "embedding_size": 64, "num_attention_heads": 4}
FIGURES = ("generator_loss", "discriminator_loss", "generator_accuracy", "replaced_recall", "original_recall")


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(__doc__, output_dir="electra", batch_size=None, learning_rate=None)
    parser.data.add_argument("--text-column", default="text")
    parser.data.add_argument("--tokenizer", help="folder or Hub name; default: word pieces trained on the texts")
    parser.data.add_argument(
        "--vocab-size", type=recipes.count, default=8000, help="of new word pieces (default: %(default)s)"
    )
    parser.data.add_argument("--whole-word", action="store_true", help="mask whole words")
    parser.model.add_argument("--generator", help="folder or Hub name, where --model is a discriminator")
    parser.model.add_argument("--size", choices=["tiny", *ELECTRA_SIZES], default="tiny")
    families = [name for name, row in FAMILIES.items() if row.detector]
    parser.model.add_argument("--family", choices=families, default="eff_electra", help="of a new model")
    parser.model.add_argument("--objective", choices=["electra", "electra_15", "replace_mlm", "all_tokens_mlm"])
    parser.model.add_argument("--sharing", choices=["embeddings", "all", "none"])
    parser.model.add_argument("--max-length", type=recipes.count, help="tokens of an input (tiny: 128)")
    args = parser.parse_args()
    size = ELECTRA_SIZES.get(args.size)
    args.max_length = args.max_length or (size.length if size else 128)
    if args.epochs is None and args.max_steps is None:
        args.max_steps = size.train_steps if size else 300
    args.batch_size = args.batch_size or (size.batch_size if size else 32)
    args.learning_rate = args.learning_rate or (size.learning_rate if size else 1e-3)
    args.mask_probability = size.mask_probability if size else 0.15
    args.warmup = min(size.warmup_steps if size else 50, (args.max_steps or 10_000) // 10)
    if args.max_length < 8:
        parser.error(f"--max-length {args.max_length}: give 8 or more")
    return args


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> EffElectraForJointPreTraining:
    """The joint model that --model names, or a new one."""
    options = {name: value for name in ("objective", "sharing") if (value := getattr(args, name))}
    if args.generator is not None:
        return EffElectraForJointPreTraining.from_pretrained_pair(args.generator, args.model, **options)
    if args.model is not None:
        kind = AutoConfig.from_pretrained(args.model).model_type
        if kind != EffElectraJointConfig.model_type:
            raise ValueError(f"{args.model} is a {kind}, one of two models: name the other one with --generator.")
        return EffElectraForJointPreTraining.from_pretrained(args.model)
    family = getattr(hf_efficient_attn, FAMILIES[args.family].config_name)
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "max_position_embeddings": args.max_length + 2,
        # Where a family's text begins at a later row, its table needs the rows before it.
        "position_offset": 0,
    }
    if args.size != "tiny":
        config = EffElectraJointConfig.from_size(args.size, family=family, options=options, **fields)
    else:
        discriminator = family(**TINY, intermediate_size=512, **fields)
        config = EffElectraJointConfig.from_discriminator(discriminator, 1 / 4, **options)
    return EffElectraForJointPreTraining(config)


def make_blocks(side: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Any:
    """Full blocks of tokens; of a stream, those of a thousand texts at a time."""
    if isinstance(side, Dataset):
        return pack_texts(side, tokenizer, args.max_length, args.text_column)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = Dataset.from_dict({"text": batch[args.text_column]})
        return pack_texts(texts, tokenizer, args.max_length).to_dict()

    return side.map(encode, batched=True, remove_columns=list(next(iter(side))))


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[ElectraTrainer, str | None]:
    """The Trainer and the checkpoint to go on from."""
    checkpoint = recipes.checkpoint_to_resume(args)
    if args.generator is not None and args.model is None:
        raise ValueError("--generator goes with --model, the discriminator: name both.")
    arguments = recipes.training_arguments(
        args,
        train_sampling_strategy="random",
        warmup_steps=args.warmup,
        weight_decay=0.01,
        adam_beta2=0.999,
        adam_epsilon=1e-6,
        ddp_find_unused_parameters=False,
    )
    with arguments.main_process_first():
        train, held_out = recipes.read_texts(args, eval_share=0.05, txt_rows="line")
    tokenizer = recipes.load_tokenizer(
        checkpoint or args.tokenizer or args.model,
        lambda: train_wordpieces(
            (row[args.text_column] for row in train.take(10_000)), args.vocab_size, args.max_length
        ),
    )
    set_seed(args.seed)
    model = make_model(args, tokenizer)
    with arguments.main_process_first():
        blocks = [make_blocks(side, tokenizer, args) for side in (train, held_out)]
    if not args.streaming and not all(blocks):
        raise ValueError("there are too few texts for a training and an evaluation side: give more.")
    collator = DataCollatorForReplacedTokenDetection(
        tokenizer, args.mask_probability, whole_word=args.whole_word, seed=args.seed
    )
    sizes = [part.num_parameters() for part in (model.generator, model.discriminator)]
    if arguments.process_index == 0:
        print(
            f"{recipes.rows_of(blocks[0])} blocks of up to {args.max_length} tokens, "
            f"{recipes.rows_of(blocks[1])} held out; "
            f"{len(tokenizer):,} tokens; generator {sizes[0]:,} and discriminator {sizes[1]:,} parameters, "
            f"{model.num_parameters():,} in all"
        )
    trainer = ElectraTrainer(
        model,
        arguments,
        train_dataset=blocks[0],
        eval_dataset=blocks[1],
        processing_class=tokenizer,
        data_collator=collator,
    )
    return trainer, recipes.checkpoint_to_resume(args, model)


def main() -> None:
    args = read_arguments()
    trainer, checkpoint = prepare(args)
    start = time.perf_counter()
    metrics = recipes.train_and_save(trainer, args, checkpoint, curves=FIGURES)
    minutes = (time.perf_counter() - start) / 60
    if not trainer.is_world_process_zero():
        return
    model = EffElectraForJointPreTraining.from_pretrained(args.output_dir)
    model.save_discriminator(args.output_dir / "discriminator")
    model.save_generator(args.output_dir / "generator")
    for name in ("discriminator", "generator"):
        trainer.processing_class.save_pretrained(args.output_dir / name)
    print(f"\nheld out, after {trainer.state.global_step} steps in {minutes:.1f} minutes:")
    for name in ("loss", *FIGURES, "replaced_rate"):
        if f"eval_{name}" in metrics:
            print(f"    {name.replace('_', ' '):20} {metrics[f'eval_{name}']:.3f}")
    print(f"\nBoth models, figures and training.png: {args.output_dir}. To use the discriminator:\n")
    print("    import hf_efficient_attn")
    print("    from transformers import AutoModelForSequenceClassification")
    print(f'    AutoModelForSequenceClassification.from_pretrained("{args.output_dir}/discriminator", num_labels=2)')


if __name__ == "__main__":
    main()
