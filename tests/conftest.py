"""Where there is no GPU, Triton interprets the kernels of one. It has to know before it is first imported."""

import os

import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
