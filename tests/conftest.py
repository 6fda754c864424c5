"""Where there is no GPU, Triton interprets the kernels of one. It has to know before it is first imported."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels take float32 on this device; the names of those that were called."""
    from triton_interpreter import DEVICE

    from hf_efficient_attn.cuda import FUSED
    from hf_efficient_attn.functional import FusedTable

    names: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return FUSED[name](*args, **kwargs)

        return kernel

    table = {name: counted(name) for name in FUSED}
    monkeypatch.setattr(FusedTable, "source", staticmethod(lambda: table))
    monkeypatch.setattr(FusedTable, "devices", (DEVICE.type,))
    monkeypatch.setattr(FusedTable, "dtypes", (torch.float32,))
    return names
