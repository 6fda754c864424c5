"""Outputs as tuples, by the config or by the call, from every head of every family."""

import pytest
import torch
from helpers import random_images
from test_families import HEADS as TEXT_HEADS
from test_families import batch_of as text_batch
from test_families import build as build_text
from test_vision_families import HEADS as VISION_HEADS
from test_vision_families import batch_of as vision_batch
from test_vision_families import build as build_vision


@pytest.mark.parametrize(("family", "auto"), [*TEXT_HEADS, *VISION_HEADS])
@torch.no_grad()
def test_tuples_hold_what_the_dictionary_holds(family: str, auto: str) -> None:
    if (family, auto) in TEXT_HEADS:
        model = build_text(family, auto)
        inputs = text_batch(model, auto, 2, 9)
    else:
        model = build_vision(family, auto)
        inputs = {"pixel_values": random_images(2), **vision_batch(auto, 2)}
    right = model(**inputs, output_hidden_states=True).to_tuple()
    by_call = model(**inputs, output_hidden_states=True, return_dict=False)
    model.config.return_dict = False
    by_config = model(**inputs, output_hidden_states=True)
    assert model(**inputs, return_dict=True).keys()
    for ours in (by_call, by_config):
        assert type(ours) is tuple and len(ours) == len(right)
        for a, b in zip(ours, right, strict=True):
            assert type(a) is type(b)
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
