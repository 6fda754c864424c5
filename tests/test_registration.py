"""Registration with the Auto classes, in fresh processes: any order of imports, every row of `FAMILIES`."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    TINY,
    config_class,
    model_class,
    no_warnings,
    tiny_config,
    tiny_pieces,
    tiny_tokenizer,
    tiny_unigrams,
    tiny_wordpieces,
)
from transformers import AutoConfig, AutoModel, AutoTokenizer

from hf_efficient_attn import FAMILIES
from hf_efficient_attn.auto import TEXT_FAMILIES, VISION_FAMILIES


# Forks a child for each line of stdin, a script as JSON. What is slow to import is imported once for all of them.
FORK_SERVER = """
import contextlib, importlib, json, os, sys, traceback

for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        try:
            exec(compile(json.loads(line), "<script>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as output:
        text = output.read()
    status = os.waitpid(child, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), text]), flush=True)
"""

# Slow, and nothing that registers or could be registered with.
SLOW = (
    "huggingface_hub.file_download",
    "numpy",
    "safetensors.torch",
    "scipy.optimize",
    "tokenizers",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_TEXT_FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)
EVERY_VISION_FAMILY = pytest.mark.parametrize("family", VISION_FAMILIES)
EVERY_HEAD = pytest.mark.parametrize(
    ("family", "auto_name"),
    [(name, auto_name) for name, row in FAMILIES.items() for auto_name in row.heads if auto_name != "AutoBackbone"],
)


def environment() -> dict[str, str]:
    """One thread, no Hub, and this checkout on the path where it is not installed."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def fork_server(*modules: str) -> Iterator[Callable[[str], str]]:
    """Runs scripts, each in a process of its own that has imported `modules`; gives what a script printed."""
    command = [sys.executable, "-c", FORK_SERVER, *modules]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(script: str) -> str:
            print(json.dumps(script), file=server.stdin, flush=True)
            code, text = json.loads(server.stdout.readline())
            assert code == 0, f"{script}\nended with {code}:\n{text}"
            return text

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[str], str]]:
    """A process that has imported neither transformers nor the package."""
    with fork_server(*SLOW) as run:
        assert run("import sys; print('transformers' in sys.modules)") == "False\n"
        yield run


@pytest.fixture(scope="module")
def imported() -> Iterator[Callable[[str], str]]:
    """A process that has imported the package and the Auto classes, and used neither."""
    with fork_server(
        "hf_efficient_attn", *SLOW, "transformers.modeling_utils", "transformers.models.auto.modeling_auto"
    ) as run:
        assert run("import sys; print([name for name in sys.modules if '.modeling_eff_' in name])") == "[]\n"
        yield run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`(family, Auto class)` -> a folder with a saved model, made once."""
    made: dict[str, Path] = {}

    def folder(family: str, auto_name: str) -> Path:
        cls = model_class(family, auto_name)
        if cls.__name__ not in made:
            made[cls.__name__] = tmp_path_factory.mktemp(cls.__name__)
            cls(tiny_config(family)).save_pretrained(made[cls.__name__])
        return made[cls.__name__]

    return folder


def test_import_is_quick_and_lazy() -> None:
    """The best of three, because the machine may be busy: under 0.3 s on top of transformers, and no torch."""
    script = (
        "import sys, time, transformers\n"
        "before = 'torch' in sys.modules\n"
        "start = time.perf_counter()\n"
        "import hf_efficient_attn\n"
        "took = time.perf_counter() - start\n"
        "ours = [name for name in sys.modules if name.startswith('hf_efficient_attn.models')]\n"
        "lazy = ('torch' in sys.modules) == before and not ours\n"
        "print(took, lazy)\n"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        took, lazy = done.stdout.split()
        assert lazy == "True"
        times.append(float(took))
        if min(times) < 0.3:
            break
    assert min(times) < 0.3, times


ORDERS = {
    "package first": "import hf_efficient_attn\nfrom transformers import BertModel, AutoModel, AutoConfig",
    "all of transformers first": "from transformers import BertModel, AutoModel, AutoConfig\nimport hf_efficient_attn",
    "table of configs first": (
        "import transformers.models.auto.configuration_auto\nimport hf_efficient_attn\n"
        "from transformers import AutoModel, AutoConfig"
    ),
    "an Auto class in use first": (
        "from transformers import AutoModel, AutoConfig, BertConfig\n"
        "AutoModel.from_config(BertConfig(num_hidden_layers=1, hidden_size=12, vocab_size=9, intermediate_size=2))\n"
        "import hf_efficient_attn"
    ),
    "a model class of ours first": (
        "from hf_efficient_attn import EffLongformerForMaskedLM\nfrom transformers import AutoModel, AutoConfig"
    ),
    "a config class of ours first": (
        "from hf_efficient_attn import EffLongformerConfig\nEffLongformerConfig()\n"
        "from transformers import AutoModel, AutoConfig"
    ),
    "a module of ours first": (
        "from hf_efficient_attn.models.eff_longformer.modeling_eff_longformer import EffLongformerModel\n"
        "from transformers import AutoModel, AutoConfig"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports(order: str, fresh: Callable[[str], str], folders: Callable[[str, str], Path]) -> None:
    folder = str(folders("eff_longformer", "AutoModel"))
    fresh(
        f"{ORDERS[order]}\n"
        "import sys\n"
        f"model = AutoModel.from_pretrained({folder!r})\n"
        "assert type(model).__module__.startswith('hf_efficient_attn.models.'), type(model)\n"
        f"again = AutoModel.from_config(AutoConfig.from_pretrained({folder!r}))\n"
        "assert type(again) is type(model)\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('hf_efficient_attn')], sys.meta_path\n"
        "table = sys.modules['transformers.models.auto.configuration_auto']\n"
        "assert not type(table.__spec__.loader).__module__.startswith('hf_efficient_attn'), table.__spec__\n"
    )


def test_table_of_configs_loads_no_more_of_transformers(fresh: Callable[[str], str]) -> None:
    """Everybody who imports an Auto class or a tokenizer pays for what our configs import."""
    script = (
        "import sys\n{}from transformers import AutoConfig, AutoTokenizer\n"
        "print(*(name for name in sys.modules if name.split('.')[0] in ('transformers', 'hf_efficient_attn')))\n"
    )
    without, loaded = (set(fresh(script.format(x)).split()) for x in ("", "import hf_efficient_attn\n"))
    assert not [name for name in loaded if ".modeling_" in name and name.startswith("hf_efficient_attn")]
    extra = sorted(name for name in loaded - without if name.startswith("transformers"))
    assert not extra, extra


@EVERY_FAMILY
def test_config_only_script(family: str, fresh: Callable[[str], str], folders: Callable[[str, str], Path]) -> None:
    folder, name = str(folders(family, "AutoModel")), FAMILIES[family].config_name
    printed = fresh(
        "import hf_efficient_attn\nfrom transformers import AutoConfig\n"
        f"print(type(AutoConfig.from_pretrained({folder!r})).__name__)\n"
        f"print(type(AutoConfig.for_model({family!r}, num_hidden_layers=1)).__name__)\n"
    )
    assert printed.split() == [name, name]


@EVERY_HEAD
def test_every_head_loads_in_a_fresh_process(
    family: str, auto_name: str, imported: Callable[[str], str], folders: Callable[[str, str], Path]
) -> None:
    folder = str(folders(family, auto_name))
    printed = imported(
        f"import hf_efficient_attn, transformers\nmodel, info = transformers.{auto_name}.from_pretrained(\n"
        f"    {folder!r}, output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "print('loaded', type(model).__module__.split('.')[0], type(model).__name__)\n"
    )
    expected = model_class(family, auto_name).__name__
    assert printed.splitlines()[-1] == f"loaded hf_efficient_attn {expected}"


@EVERY_FAMILY
def test_every_class_is_public_and_has_a_head_for_each_task(family: str) -> None:
    import hf_efficient_attn

    row = FAMILIES[family]
    text = {"AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"}
    vision = {"AutoModel", "AutoModelForMaskedImageModeling", "AutoModelForImageClassification", "AutoBackbone"}
    assert (text if family in TEXT_FAMILIES else vision) <= row.heads.keys()
    for name in (row.config_name, *row.model_names.values()):
        assert name in hf_efficient_attn.__all__ and name in dir(hf_efficient_attn)
        assert getattr(hf_efficient_attn, name).__name__ == name
    for name in row.model_names.values():
        assert getattr(hf_efficient_attn, name).config_class is config_class(family)
    with pytest.raises(AttributeError, match="no attribute 'EffNothing'"):
        hf_efficient_attn.EffNothing  # noqa: B018


def test_register_is_idempotent(fresh: Callable[[str], str]) -> None:
    fresh(
        "import sys, hf_efficient_attn\n"
        "ours = lambda: [f for f in sys.meta_path if type(f).__module__.startswith('hf_efficient_attn')]\n"
        "for _ in range(3): hf_efficient_attn.register(), hf_efficient_attn.register_attention()\n"
        "waiting = sorted(f.module.rpartition('.')[2] for f in ours())\n"
        "assert waiting == ['configuration_auto', 'fused', 'masking_utils', 'modeling_utils'], sys.meta_path\n"
        "from transformers import AutoConfig, AutoModel\n"
        "for _ in range(3): hf_efficient_attn.register()\n"
        "assert not [f for f in ours() if 'auto' in f.module], sys.meta_path\n"
        "config = AutoConfig.for_model('eff_longformer', num_hidden_layers=1)\n"
        "for _ in range(3): hf_efficient_attn.register()\n"
        "from transformers.models.auto.modeling_auto import MODEL_MAPPING\n"
        "before = dict(MODEL_MAPPING._extra_content)\n"
        "hf_efficient_attn.register()\n"
        "assert MODEL_MAPPING._extra_content == before and len(before) == len(hf_efficient_attn.FAMILIES), before\n"
        "assert MODEL_MAPPING[type(config)] is hf_efficient_attn.EffLongformerModel\n"
        "assert not ours(), sys.meta_path\n"
    )


# Upstream's register lets the later class win in silence, so ours looks whenever it is called.
@pytest.mark.parametrize(
    "script",
    ["{foreign}import hf_efficient_attn", "import hf_efficient_attn\n{foreign}hf_efficient_attn.register()"],
    ids=["before the package", "after the package"],
)
def test_foreign_class_under_our_type_is_refused(script: str, fresh: Callable[[str], str]) -> None:
    foreign = (
        "from transformers import AutoConfig, PreTrainedConfig\n"
        "class Foreign(PreTrainedConfig):\n    model_type = 'eff_longformer'\n"
        "AutoConfig.register('eff_longformer', Foreign)\n"
    )
    lines = script.format(foreign=foreign).splitlines()
    printed = fresh(
        "\n".join([*lines[:-1], "try:", f"    {lines[-1]}", "except ValueError as error:", "    print(error)"])
    )
    for part in ("'eff_longformer'", "__main__.Foreign", "remove that registration"):
        assert part in printed, printed


def test_upstream_types_are_untouched(fresh: Callable[[str], str], tmp_path: Path) -> None:
    names = {"longformer": "Longformer", "bert": "Bert", "roberta": "Roberta", "electra": "Electra"}
    transformers.LongformerConfig(**TINY, attention_window=4).save_pretrained(tmp_path)
    fresh(
        "from transformers.models.auto import configuration_auto, modeling_auto\n"
        "configs, models = dict(configuration_auto.CONFIG_MAPPING_NAMES), dict(modeling_auto.MODEL_MAPPING_NAMES)\n"
        "import hf_efficient_attn\n"
        "from transformers import AutoConfig, AutoModel\n"
        "hf_efficient_attn.EffLongformerConfig(num_hidden_layers=1)\n"
        f"for name, prefix in {names!r}.items():\n"
        "    config = AutoConfig.for_model(name)\n"
        "    assert type(config).__name__ == prefix + 'Config', config\n"
        "    assert type(config).__module__.startswith('transformers.'), config\n"
        "    assert AutoModel._model_mapping[type(config)].__name__ == prefix + 'Model'\n"
        f"loaded = AutoConfig.from_pretrained({str(tmp_path)!r})\n"
        "assert type(loaded).__name__ == 'LongformerConfig', loaded\n"
        "assert type(AutoModel.from_config(loaded)).__module__.startswith('transformers.')\n"
        "assert dict(configuration_auto.CONFIG_MAPPING_NAMES) == configs\n"
        "assert dict(modeling_auto.MODEL_MAPPING_NAMES) == models\n"
    )


@EVERY_TEXT_FAMILY
def test_tokenizer(family: str, tmp_path: Path, fresh: Callable[[str], str]) -> None:
    # The default of a family reads its own kind of vocabulary.
    make = {"BertTokenizer": tiny_wordpieces, "BigBirdTokenizer": tiny_unigrams, "ReformerTokenizer": tiny_pieces}
    tokenizer = make.get(FAMILIES[family].tokenizer, tiny_tokenizer)(max_length=77)
    tokenizer.save_pretrained(tmp_path)
    tiny_config(family).save_pretrained(tmp_path)
    with no_warnings():
        again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 77
    assert again("the fox", "a dog")["input_ids"] == tokenizer("the fox", "a dog")["input_ids"]

    # A folder that names no tokenizer class gets the family's default, also where nothing else was imported before.
    file = tmp_path / "tokenizer_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved.pop("tokenizer_class")
    file.write_text(json.dumps(saved), encoding="utf-8")
    printed = fresh(
        "import hf_efficient_attn\nfrom transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})\n"
        "print(type(tokenizer).__name__, tokenizer.model_max_length, *tokenizer('the fox', 'a dog')['input_ids'])\n"
    )
    ids = tokenizer("the fox", "a dog")["input_ids"]
    assert printed.splitlines()[-1].split() == [FAMILIES[family].tokenizer, "77", *map(str, ids)]


@EVERY_VISION_FAMILY
@pytest.mark.parametrize("named", [True, False])
def test_image_processor(family: str, named: bool, tmp_path: Path, fresh: Callable[[str], str]) -> None:
    """The processor that a folder names, and the family's default where it names none; the PIL form."""
    try:
        transformers.AutoImageProcessor.register  # noqa: B018
    except ImportError:
        pytest.skip("this version of transformers has no AutoImageProcessor without torchvision")
    processor = transformers.ViTImageProcessorPil(size={"height": 12, "width": 20})
    processor.save_pretrained(tmp_path)
    tiny_config(family).save_pretrained(tmp_path)
    if not named:
        file = tmp_path / "preprocessor_config.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        saved.pop("image_processor_type")
        file.write_text(json.dumps(saved), encoding="utf-8")
    printed = fresh(
        "import hf_efficient_attn, numpy\nfrom transformers import AutoImageProcessor\n"
        f"processor = AutoImageProcessor.from_pretrained({str(tmp_path)!r}, backend='pil')\n"
        "image = numpy.zeros((30, 40, 3), dtype='uint8')\n"
        "print(type(processor).__name__, *processor(image, return_tensors='pt').pixel_values.shape)\n"
    )
    assert printed.splitlines()[-1].split() == [f"{FAMILIES[family].image_processor}Pil", "1", "3", "12", "20"]


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "dict": lambda config: type(config).from_dict(config.to_dict()),
    "diff": lambda config: type(config).from_dict(config.to_diff_dict()),
    "json": lambda config: type(config).from_dict(json.loads(config.to_json_string())),
}


@EVERY_FAMILY
@pytest.mark.parametrize("how", COPIES)
def test_configs_can_be_copied(how: str, family: str) -> None:
    config = tiny_config(family, num_labels=5, problem_type="regression")
    config.note = "kept"
    other = COPIES[how](config)
    assert type(other) is type(config) and other is not config
    assert other.to_dict() == config.to_dict() and other.note == "kept" and other.num_labels == 5
    if how in ("deepcopy", "pickle"):
        other.note, other.num_labels = "changed", 3
        assert config.note == "kept" and config.num_labels == 5


@EVERY_FAMILY
def test_every_config_field_survives_a_file(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is config_class(family)
    for field in fields(config):
        if field.name == "transformers_version":  # written by transformers when it saves
            continue
        assert getattr(loaded, field.name) == getattr(config, field.name), field.name


@EVERY_FAMILY
def test_from_config(family: str) -> None:
    config = tiny_config(family)
    with no_warnings():
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    assert type(model) is model_class(family, "AutoModel") and model.dtype == torch.bfloat16
    for auto_name, name in FAMILIES[family].model_names.items():
        assert type(getattr(transformers, auto_name).from_config(config)).__name__ == name
