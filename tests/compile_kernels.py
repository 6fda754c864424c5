"""Compiles every kernel for GPUs that are not there: what the interpreter takes, Triton may not.

Prints a line for each: the GPU's compute capability, the kernel, and its shared memory. To be run in a process of its
own, because Triton decides at its import whether kernels are interpreted.
"""

from typing import Any

import torch
from torch import Tensor
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hf_efficient_attn.cuda import FUSED, room


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
compiled: set[tuple] = set()
capability = 90


def type_of(value: Any) -> str:
    """A launch argument's type in a kernel's signature."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value is True or value is False or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launch(kernel: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **settings: Any) -> None:
    """In place of starting a kernel: compile it for these arguments."""
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
    signature, constants, facts = {}, {}, {}
    for number, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = args[number] if number < len(args) else settings[name]
        signature[name] = "constexpr" if parameter.is_constexpr else type_of(value)
        if signature[name] == "constexpr":
            constants[(number,)] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            # As when a kernel is started; loads are ahead of their use then, in more memory.
            facts[(number,)] = [["tt.divisibility", 16]]
    key = (capability, kernel.fn.__module__, kernel.__name__, str(signature), str(constants), str(options))
    if key not in compiled:
        compiled.add(key)
        source = ASTSource(kernel, signature, constexprs=constants, attrs=facts)
        binary = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
        print(capability, name, binary.metadata.shared, flush=True)


def run(dtype: torch.dtype, dropout_p: float, padded: bool) -> None:
    """Each operator once, forward and backward."""

    def leaf(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=kind).requires_grad_()

    heads, length = 2, 300
    query, key, value = (leaf(1, length, heads, 64).transpose(1, 2) for _ in range(3))
    keep = torch.ones(1, length, dtype=torch.bool) if padded else None
    slot = torch.zeros(1, 1, dtype=torch.long)
    tokens: dict[str, Any] = dict.fromkeys(("global_key", "global_value", "global_index", "global_valid"))
    if padded:
        tokens = {"global_key": key[:, :, :1], "global_value": value[:, :, :1]}
        tokens |= {"global_index": slot, "global_valid": slot == 0}
    shape = {"back": 64, "ahead": 64, "causal": False, "scale": 0.125, "dropout_p": dropout_p}
    results = [FUSED["window"](query, key, value, keep, counted=keep, **tokens, **shape)]
    lists = torch.zeros(1, heads, 5, 3, dtype=torch.int32)
    tables = (
        (slot.int()[:, None].expand(1, 1, 320), torch.ones(1, 1, 320, dtype=torch.bool)) if padded else (None, None)
    )
    shape = {"size": 64, "causal": padded, "exclude_self": padded, "scale": 0.125, "dropout_p": dropout_p}
    results.append(FUSED["blocks"](query, key, value, lists, *tables, **shape)[0])
    if padded:
        shape |= {
            "size": 128 if capability == 90 else 64,
            "causal": False,
            "exclude_self": False,
            "grid": (1, 23, 3, 3),
        }
        results.append(FUSED["blocks"](query, key, value, lists, *tables, **shape)[0])
    if padded and capability == 90:
        wide = [leaf(1, length, heads, 128).transpose(1, 2) for _ in range(3)]
        results.append(FUSED["blocks"](*wide, lists, None, None, size=128, scale=0.125, dropout_p=dropout_p)[0])
    weights, table = leaf(1, heads, 64, 64, kind=torch.float32), leaf(1, heads, 64, 64, kind=torch.float32)
    options = {"root": 1.0, "dropout_p": dropout_p, "precise": padded}
    sums, ones, _ = FUSED["feature_sums"](key, value, weights, keep, half_norm=not padded, **options)
    results += [sums, FUSED["feature_mix"](query, weights, table, ones, None, keep, **options)]
    results.append(FUSED["segment_means"](key, torch.zeros(1, length, dtype=torch.long), torch.ones(1, 64, 1)))
    half = slice(None) if capability == 90 else slice(32)  # what there is room for
    results.append(FUSED["pinv_iterations"](weights[..., half, half], table[..., half, half], 2))
    results.append(FUSED["add_nearby"](query, value, leaf(heads, 65), keep))
    sum(x.float().sum() for x in results).backward()


if __name__ == "__main__":
    JITFunction.run = launch
    run(torch.bfloat16, 0.0, padded=False)
    run(torch.bfloat16, 0.1, padded=True)
    capability, room.ROOM = 89, room.NARROW
    run(torch.float16, 0.1, padded=True)
    run(torch.float16, 0.0, padded=False)
