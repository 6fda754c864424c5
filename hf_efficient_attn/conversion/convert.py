"""`convert`: a checkpoint of transformers as a model of ours, and the way back."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from .build import Positions, build_ours
from .configs import check_options
from .images import sample_images
from .limits import ALWAYS, sample_lengths, softmax_length
from .positions import check_positions_option
from .report import ConversionReport, Measure, measure, sample_ids, text_inputs
from .reverse import build_original
from .saving import check_folder, write_folder
from .sources import Source, open_source
from .table import APPROXIMATE, BERT_SHAPED, FAMILY_NAMES, find_row


_IDLE_BIAS = (
    "lm_head.bias is copied, but transformers' Reformer does not add it, and eff_reformer does, as the released models "
    "were trained: logits differ by it"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


@dataclass(frozen=True)
class Conversion:
    """What `convert` gives.

    Args:
        model: the new model, in evaluation mode, with weights of its own in the source's dtype.
        processor: the source's tokenizer or image processor, None where there is none.
        report: what was done and how far the outputs are from the source's.
        place: folder or name of the source, None for an object.
    """

    model: PreTrainedModel
    processor: Any
    report: ConversionReport
    place: str | None = None

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write model, tokenizer or image processor, and the report (`conversion.json`), all or nothing.

        Args:
            folder: a new or empty one.
            force: replace the model that it holds.

        Raises:
            ValueError: a folder that may not be written to.
        """
        path = check_folder(folder, force, self.place)

        def write(new: Path) -> None:
            self.model.save_pretrained(new)
            if self.processor is not None:
                self.processor.save_pretrained(new)

        write_folder(path, write, self.report.to_dict())
        return path


def convert(
    source: Any,
    to: str,
    max_length: int | None = None,
    *,
    positions: str = "tile",
    architecture: str | None = None,
    processor: Any = None,
    sample_text: str | None = None,
    sample_length: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Conversion:
    """Make a model of ours from a checkpoint of transformers, or the other way round.

    Weights are copies. What the target has besides starts as its paper says (global projections as the local ones, a
    convolution as zeros), nothing is silently random: the report names it. Which sources become what, and how exactly,
    stands in `CONVERSIONS` and `REVERSALS` (`model_cards/CONVERSION.md`).

    Args:
        source: a model of transformers or of this package, its folder, or its name on the Hub.
        to: a family (`"eff_longformer"`, ...), or for a model of ours `"longformer"`, `"big_bird"`,
            `"nystromformer"`, `"reformer"`, `"electra"` or `"vit"`.
        max_length: tokens that the new model reads; None as the source.
        positions: what more positions get: `"tile"` repeats the table as Longformer's authors did, `"interpolate"`
            spreads it, `"init"` draws new rows.
        architecture: the class of the weights (`"BertForMaskedLM"`), where the source's config does not name it; the
            base model (`"BertModel"`) of a folder with a head leaves the head out.
        processor: tokenizer or image processor of a model object; of a folder or name its own is taken.
        sample_text: text to compare both models on, a piece of English by default.
        sample_length: its tokens; by default 128, and 512 or as many as both read.
        seed: of drawn positions; torch's global generator is not touched by them.
        revision, token: of a name on the Hub.
        options: fields of the new config (`attention_window=256`, `num_landmarks=64`, `attention="longformer"`, ...),
            but for those that the source decides; for Nystromformer's way back `segment_means_seq_len`.

    Returns:
        The model, tokenizer or image processor, and a report; `save_pretrained(folder)` writes all of them.

    Raises:
        ValueError: a conversion that the table refuses, with the reason; a field that the target cannot hold; unknown
            options; weights that are missing, unknown or of another shape, by name.
    """
    check_positions_option(positions)
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
        raise ValueError(f"max_length = {max_length!r}: give a whole number of tokens, or None.")
    where = {name: x for name, x in (("revision", revision), ("token", token)) if x is not None}
    opened = open_source(source, to, architecture, **where)
    row = find_row(opened.model_type, to)
    dtype, device = opened.model.dtype, opened.model.device
    processor = copy.deepcopy(processor) if processor is not None else _processor_of(opened, **where)
    report = ConversionReport(opened.model_type, to, opened.class_name, "", row.verdict, row.why)
    report.left_out += opened.left_out
    keeps_positions = True
    if _has_idle_bias(opened.model):
        report.notes.append(_IDLE_BIAS)
    if opened.model_type in FAMILY_NAMES:
        made = _back(opened, to, max_length, options)
        model, report.copied, report.new = made.model, made.copied, made.new
    else:
        check_options(to, options)
        separator = getattr(processor, "sep_token_id", None)
        built = build_ours(opened, to, Positions(max_length, positions, seed), options, separator)
        model, keeps_positions = built.model, built.keeps_positions
        report.copied, report.new = built.filled.copied, built.filled.new
        report.left_out += [name for name in built.filled.left_out if name not in report.left_out]
        report.notes += built.notes
        reach = softmax_length(model.config)
        if opened.model_type in BERT_SHAPED and 0 < reach < model.config.max_input_length and keeps_positions:
            report.notes.append(f"with these options exact for texts of up to {reach:,} tokens")
    report.target_class = type(model).__name__
    if processor is None:
        report.notes.append("no tokenizer or image processor was given or found; save one beside the model")
    model.to(device).eval()
    report.measured = _measure_all(opened, model, processor, sample_text, sample_length, keeps_positions)
    report.next_steps = _next_steps(report, opened)
    model.to(dtype)
    if hasattr(processor, "model_max_length"):
        ours = model.config if model.config.model_type in FAMILY_NAMES else opened.model.config
        processor.model_max_length = ours.max_input_length
    return Conversion(model, processor, report, opened.place)


def _back(source: Source, to: str, max_length: int | None, options: dict[str, Any]) -> Any:
    options = dict(options)
    segment = options.pop("segment_means_seq_len", None)
    if options or max_length is not None:
        name = next(iter(options), "max_length")
        raise ValueError(f"{name}: transformers' class takes everything from the model; leave it out.")
    return build_original(source, to, segment)


def _processor_of(source: Source, **where: Any) -> Any:
    """The tokenizer or image processor of a folder or of a name on the Hub, None where there is none."""
    if source.place is None:
        return None
    is_image = hasattr(source.model.config, "image_size")
    folder = Path(source.place)
    names = ("preprocessor_config.json",) if is_image else _TOKENIZER_FILES
    if folder.is_dir() and not any(any(folder.glob(name)) for name in names):
        return None
    try:
        return (AutoImageProcessor if is_image else AutoTokenizer).from_pretrained(source.place, **where)
    except OSError:
        if folder.is_dir():
            raise
        return None  # the repository has none


def _measure_all(
    source: Source, model: PreTrainedModel, processor: Any, text: str | None, length: int | None, keeps: bool
) -> list[Measure]:
    """Distances on samples in float32; `keeps` says that short texts have the positions that they had."""
    theirs = source.copy_in_float32()
    ours = model.config if model.config.model_type in FAMILY_NAMES else theirs.config
    if hasattr(ours, "image_size"):
        inputs = sample_images(theirs.config, model.device)
        same = model.config.image_size == theirs.config.image_size
        exact = softmax_length(ours) == ALWAYS and same
        return [measure(theirs, model, inputs, f"{theirs.config.image_size} pixels", exact)]
    kinds = {theirs.config.model_type, model.config.model_type}
    # transformers' Nystromformer lets the texts of a batch depend on each other.
    choices = (1 if "nystromformer" in kinds else 2) if source.suffix == "ForMultipleChoice" else 0
    marks = kinds == {"longformer", "eff_longformer"}
    arguments = functools.partial(text_inputs, model, choices=choices, marks_global=marks)
    found = []
    for tokens, exact in sorted(sample_lengths(source, model.config, length).items()):
        ids = sample_ids(processor, theirs.config, tokens, text)
        size, differs = f"{tokens:,} tokens", _has_idle_bias(theirs)
        found.append(measure(theirs, model, arguments(ids), size, exact and keeps, differs))
    return found


def _has_idle_bias(model: PreTrainedModel) -> bool:
    """Whether it is a Reformer of either package whose language-model head has a bias that only ours adds."""
    bias = getattr(getattr(model, "lm_head", None), "bias", None)
    return model.config.model_type in ("reformer", "eff_reformer") and bias is not None and bool(bias.any())


def _next_steps(report: ConversionReport, source: Source) -> list[str]:
    """What to do before the model is used, where its outputs are not the source's everywhere."""
    is_back = source.model_type in FAMILY_NAMES
    is_longer = any(" -> " in note for note in report.notes)
    approximate = report.verdict == APPROXIMATE or any(not x.exact_here for x in report.measured)
    if is_back or not (approximate or is_longer):
        return []
    if hasattr(source.model.config, "image_size"):
        return ["train on: python examples/train_vit.py --checkpoint OUT"]
    command = "python examples/pretrain_masked_lm.py --model OUT"
    if source.suffix in ("ForMaskedLM", "ForPreTraining"):
        return [f"continue pretraining, then fine-tune: {command}"]
    return [f"fine-tune; better, convert the masked-LM checkpoint, continue pretraining ({command}) and fine-tune that"]
