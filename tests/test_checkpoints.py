"""The checkpoint to go on from: one of a real run, whole and with each of its files damaged."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import collect_warnings, model_class, no_warnings, random_ids, tiny_config, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from hf_efficient_attn import checkpoint_problems, last_complete_checkpoint


# What training goes on without, so that its absence cannot be known. Damage to what is there is seen.
NOT_READ_IN_TRAINING = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
# For people, who may write into it what they like.
CARD = "README.md"


def make_trainer(folder: Path, hidden_size: int = 32, shard: str | None = None, **options: Any) -> Trainer:
    """A causal model, since those have most files, with dropout."""
    set_seed(0)
    tokenizer = tiny_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = tiny_config("eff_longformer", vocab_size=len(tokenizer), hidden_size=hidden_size, **ids, **dropout)
    model = model_class("eff_longformer", "AutoModelForCausalLM")(config)
    if shard is not None:
        model.save_pretrained = partial(model.save_pretrained, max_shard_size=shard)
    arguments = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            **options,
        },
    )
    return Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": random_ids(1, 16 + row % 3, seed=row)[0].tolist()} for row in range(6)],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    make_trainer(folder, shard="90KB").train()
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Checkpoints 2 and 4 of the run, to be damaged."""
    return copy_of(run, tmp_path / "copied")


def copy_of(run: Path, to: Path) -> Path:
    for step in (2, 4):
        shutil.copytree(run / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to


def files_of(checkpoint: Path) -> list[str]:
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != CARD)
    assert len(names) > 8 and all((checkpoint / name).is_file() for name in names)
    return names


def test_what_a_script_reads_besides_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    output = copy_of(run, tmp_path / "run")
    assert last_complete_checkpoint(output, files=["tokenizer.json"]) == str(output / "checkpoint-4")
    (output / "checkpoint-4" / "tokenizer.json").unlink()
    assert last_complete_checkpoint(output) == str(output / "checkpoint-4")
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over.*: tokenizer.json: missing"):
        assert last_complete_checkpoint(output, files=["tokenizer.json"]) == str(output / "checkpoint-2")


def passes_over(output: Path, name: str) -> bool:
    """Whether the finder falls back to checkpoint-2, in one warning that names checkpoint-4 and the file."""
    with collect_warnings() as said:
        found = last_complete_checkpoint(output)
    if found == str(output / "checkpoint-4"):
        assert not said
        return False
    assert found == str(output / "checkpoint-2") and len(said) == 1, said
    assert f"{output / 'checkpoint-4'} is passed over" in said[0] and f"{name}: " in said[0], said
    assert any(f"{name}: " in line for line in checkpoint_problems(output / "checkpoint-4"))
    return True


def misses(output: Path, name: str, damages: Iterator[bytes | None]) -> list[str]:
    """Damages the file of checkpoint-4 in each of these ways; what was not seen."""
    path = output / "checkpoint-4" / name
    content, missed = path.read_bytes(), []
    for count, damaged in enumerate(damages):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        if count == 0 and not passes_over(output, name):
            missed.append(f"{name}, at first")
        elif not any(f"{name}: " in line for line in checkpoint_problems(path.parent)):
            missed.append(f"{name}, damage {count}")
    path.write_bytes(content)
    return missed


def truncations(content: bytes) -> Iterator[bytes]:
    """Cut off in the middle, at the last byte that says something, and after the first one."""
    last = len(content.rstrip(b"\n")) if content[:1] == b"{" else len(content)
    for length in (last // 2, last - 1, 1):
        yield content[:length]


def flips(content: bytes) -> Iterator[bytes]:
    """A byte that changes: here and there in a text or a header, and in entries of an archive."""
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            places = []
            entries = [entry for entry in archive.infolist() if entry.file_size]
            for count, entry in enumerate(entries[:: max(1, len(entries) // 8)]):
                name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
                start = entry.header_offset + 30 + name + extra
                # Its first byte, its last one, or one between.
                places.append(start + (0, entry.file_size - 1, entry.file_size // 2)[count % 3])
    else:
        # safetensors: the header's length and the header, without the spaces that fill it up.
        is_text = content[:1] == b"{"
        last = len(content.rstrip()) if is_text else content.rindex(b"}", 0, 8 + int.from_bytes(content[:8], "little"))
        places = sorted({last * part // 8 for part in range(9)} - ({last} if is_text else set()))
    for place in places:
        yield content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], Iterator[bytes | None]]] = {
    "deleted": lambda content: iter([None]),
    "emptied": lambda content: iter([b""]),
    "filled with zeros": lambda content: iter([bytes(len(content))]),
    "truncated": truncations,
    "flipped": flips,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(damage: str, run: Path, copied: Path) -> None:
    missed = []
    for name in files_of(copied / "checkpoint-4"):
        damages = DAMAGES[damage]((copied / "checkpoint-4" / name).read_bytes())
        missed += misses(copied, name, damages)
    assert missed == [f"{name}, at first" for name in sorted(NOT_READ_IN_TRAINING) if damage == "deleted"]

    # With all of the damages at once, training goes on from what was found, and ends where the run ended.
    for name in files_of(copied / "checkpoint-4"):
        path = copied / "checkpoint-4" / name
        damaged = next(DAMAGES[damage](path.read_bytes()))
        path.unlink() if damaged is None else path.write_bytes(damaged)
    trainer = make_trainer(copied)
    with collect_warnings() as said:
        last = last_complete_checkpoint(copied, model=trainer.model)
    assert last == str(copied / "checkpoint-2") and len(said) == 1
    with no_warnings():
        trainer.train(resume_from_checkpoint=last)
    assert_same_end(copied, run)


def assert_same_end(folder: Path, run: Path) -> None:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    weights, wanted = (load_file(where / "checkpoint-6" / "model.safetensors") for where in (folder, run))
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], x) for name, x in wanted.items())


def test_training_goes_on_without_the_other_files(run: Path, copied: Path) -> None:
    for name in (*NOT_READ_IN_TRAINING, CARD):
        (copied / "checkpoint-4" / name).unlink()
    trainer = make_trainer(copied)
    with no_warnings():
        last = last_complete_checkpoint(copied, model=trainer.model)
        trainer.train(resume_from_checkpoint=last)
    assert last == str(copied / "checkpoint-4")
    assert_same_end(copied, run)


def test_sharded_weights(run: Path, sharded: Path, tmp_path: Path) -> None:
    """Every shard and the index, damaged in every way."""
    with no_warnings():
        assert last_complete_checkpoint(sharded) == str(sharded / "checkpoint-6")
    copied = copy_of(sharded, tmp_path)
    weights = [name for name in files_of(copied / "checkpoint-4") if name.startswith("model")]
    assert len(weights) > 2
    for name in weights:
        for damage in DAMAGES.values():
            assert not misses(copied, name, damage((copied / "checkpoint-4" / name).read_bytes()))

    # Whole files that are not the index's: a tensor too few or too many, and a file from elsewhere.
    shards = weights[:-1] if weights[-1].endswith(".json") else weights[1:]
    shard = copied / "checkpoint-4" / next(name for name in shards if name.endswith(".safetensors"))
    content, tensors = shard.read_bytes(), load_file(shard)
    first = min(tensors)
    save_file({name: x.clone() for name, x in tensors.items() if name != first} | {"more": torch.ones(1)}, shard)
    assert passes_over(copied, shard.name) and f"lacks {first!r}" in checkpoint_problems(shard.parent)[0]
    save_file({name: x.clone() for name, x in tensors.items()} | {"zz": torch.ones(1)}, shard)
    assert passes_over(copied, shard.name) and "has, unlike the index, 'zz'" in checkpoint_problems(shard.parent)[0]
    shard.write_bytes(content)
    index = copied / "checkpoint-4" / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    where["weight_map"][first] = "../checkpoint-2/" + shard.name
    index.write_text(json.dumps(where))
    assert passes_over(copied, index.name)

    # Undamaged again, a run in one file and one in several end with the same weights.
    shutil.rmtree(copied / "checkpoint-4")
    trainer = make_trainer(copied)
    with no_warnings():
        last = last_complete_checkpoint(copied, model=trainer.model)
        assert last == str(copied / "checkpoint-2")
        trainer.train(resume_from_checkpoint=last)
    assert_same_end(copied, run)


def header(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(table: dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def longer_tensor(table: dict[str, Any], data: bytes) -> bytes:
    name = next(name for name in table if name != "__metadata__")
    table[name]["shape"][0] += 1
    return with_header(table, data)


def outside_the_file(table: dict[str, Any], data: bytes) -> bytes:
    name = max((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"])
    table[name]["data_offsets"][1] += 4
    table[name]["shape"] = [(table[name]["data_offsets"][1] - table[name]["data_offsets"][0]) // 4]
    return with_header(table, data)


HEADERS: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "header beyond the file": lambda table, data: with_header(table, data, length=10**6),
    "header of many gigabytes": lambda table, data: with_header(table, data, length=2**60),
    "header is no JSON": lambda table, data: with_header(table, data)[:8] + b"?" + with_header(table, data)[9:],
    "bytes after the last tensor": lambda table, data: with_header(table, data + b"\0"),
    "a tensor longer than its bytes": longer_tensor,
    "a tensor beyond the file": outside_the_file,
    "no tensors": lambda table, data: with_header({}, b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_safetensors(case: str, copied: Path) -> None:
    path = copied / "checkpoint-4" / "model.safetensors"
    table, data = header(path.read_bytes())
    path.write_bytes(with_header(table, data))
    assert not passes_over(copied, path.name), "rewritten, but whole"
    path.write_bytes(HEADERS[case](table, data))
    assert passes_over(copied, path.name)


def test_pickles_are_read_and_not_run(copied: Path) -> None:
    """Whatever a file names is neither imported nor called."""

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (copied / "was-run",)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        path = copied / "checkpoint-4" / name
        content = path.read_bytes()
        torch.save({"state": Touch()}, path)
        assert passes_over(copied, name) and not (copied / "was-run").exists()
        path.write_bytes(content)
    # Trainer writes its arguments as a whole object and does not read them: it may name anything.
    path = copied / "checkpoint-4" / "training_args.bin"
    torch.save(Touch(), path)
    assert not passes_over(copied, path.name) and not (copied / "was-run").exists()
    torch.load(path, weights_only=False)
    assert (copied / "was-run").exists(), "the trap does not work"
    # An archive, but none of torch's; and a pickle without an archive around it.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert passes_over(copied, path.name)
    path.write_bytes(pickle.dumps({}))
    assert passes_over(copied, path.name)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_contents_that_do_not_fit(copied: Path) -> None:
    """Whole files of the wrong kind."""
    checkpoint = copied / "checkpoint-4"
    kept = {name: (checkpoint / name).read_bytes() for name in files_of(checkpoint)}
    rewrite(checkpoint / "trainer_state.json", lambda state: state.update(global_step=2))
    assert passes_over(copied, "trainer_state.json")
    assert checkpoint_problems(checkpoint) == ["trainer_state.json: it is of step 2"]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / "trainer_state.json").write_bytes(kept["trainer_state.json"])
        torch.save([1], checkpoint / name)
        assert passes_over(copied, name)
        (checkpoint / name).write_bytes(kept[name])
    (checkpoint / "config.json").write_text("[]")
    assert passes_over(copied, "config.json")
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").mkdir()
    assert passes_over(copied, "config.json") and checkpoint_problems(checkpoint) == ["config.json: no file"]
    # What others put beside it may be any JSON.
    (checkpoint / "config.json").rmdir()
    (checkpoint / "config.json").write_bytes(kept["config.json"])
    (checkpoint / "modules.json").write_text('[{"idx": 0}]')
    assert checkpoint_problems(checkpoint) == []
    (checkpoint / "modules.json").write_text('[{"idx": 0}')
    assert passes_over(copied, "modules.json")
