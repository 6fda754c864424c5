"""Parameter groups for optimizers: a learning rate for each depth of a model."""

import math
from typing import Any

from torch import nn


def layerwise_parameter_groups(
    model: nn.Module, learning_rate: float, layer_decay: float = 0.8, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls from the head down, as ELECTRA is fine-tuned.

    With `n` layers the head has `learning_rate`, the top layer `learning_rate * layer_decay`, layer `i` (from 0)
    `learning_rate * layer_decay ** (n - i)`, and the embeddings `learning_rate * layer_decay ** (n + 1)`. To the head
    belongs all that comes after the last layer, a final norm and a pooler too; to the embeddings what comes before the
    first one, and every table (`nn.Embedding`) that the base model holds outside its layers. A parameter used in
    several places, such as an output layer tied to the embeddings, counts as the lowest of them.

    Source: Clark et al. 2020 (ELECTRA), https://arxiv.org/abs/2003.10555, with 0.8 for small and base, 0.9 for large.
    The released code leaves one depth empty below the head: its top layer has `layer_decay ** 2`, and so has everything
    below the head one power more than here.

    Biases, norms' weights and all other parameters of one dimension have no weight decay.

    Args:
        model: any model that keeps its layers in one `nn.ModuleList` with `config.num_hidden_layers` entries, with or
            without a head: this package's families, BERT, RoBERTa, ELECTRA, DistilBERT, ViT, GPT-2 and so on.
        learning_rate: of the head; above 0.
        layer_decay: the factor from one depth to the next one below; above 0, at most 1, which gives one rate for all.
        weight_decay: of everything else than biases and norms; 0 or more.

    Returns:
        The groups from the head down, each with `"params"`, `"lr"`, `"weight_decay"` and a readable `"name"`. The head
        is first, so its rate is the one that Trainer logs. Every trainable parameter is in exactly one group, frozen
        ones (`requires_grad=False`) are in none, and no group is empty.

    Raises:
        ValueError: a number out of its range; a model without such a list of layers, or with several.

    Example:

    ```python
    >>> groups = layerwise_parameter_groups(model, learning_rate=1e-4, layer_decay=0.8, weight_decay=0.01)
    >>> trainer = Trainer(model, arguments, train_dataset=data, optimizers=(torch.optim.AdamW(groups, lr=1e-4), None))
    ```
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate = {learning_rate!r}: the head's rate must be above 0; give one such as 1e-4.")
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay = {layer_decay!r}: the factor from one depth to the next one below must be above 0 and at "
            "most 1; give 0.8 or 0.9, or 1.0 for one rate for all."
        )
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay = {weight_decay!r}: it must be 0 or more; give one such as 0.01.")

    base = getattr(model, "base_model", model)
    layers = _find_layers(base)
    steps = _steps_below_head(base, layers)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm) for p in m.parameters()}

    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():  # tied parameters come once
        if parameter.requires_grad:
            undecayed = parameter.dim() <= 1 or id(parameter) in norms or name.split(".")[-1] == "bias"
            members.setdefault((steps.get(id(parameter), 0), undecayed), []).append(parameter)

    places = ["head", *(f"layer {index}" for index in reversed(range(len(layers)))), "embeddings"]
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**step,
            "weight_decay": 0.0 if undecayed else weight_decay,
            "name": f"{places[step]}, biases and norms" if undecayed else places[step],
        }
        for (step, undecayed), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _find_layers(base: nn.Module) -> nn.ModuleList:
    config = getattr(base, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: m for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    # A layer may hold a list of the same length.
    found = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    # The decoder's layers may be of another number.
    if not count or len(found) != 1 or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} with config.num_hidden_layers = {count} has {', '.join(found) or 'nothing'} as "
            "lists of so many layers, but a rate for each layer needs exactly one such nn.ModuleList: encoder-decoder "
            "models and models that share one layer have none or several; give their parameters to the optimizer as "
            "they are."
        )
    return lists[found[0]]


def _steps_below_head(base: nn.Module, layers: nn.ModuleList) -> dict[int, int]:
    """Id of a parameter -> its distance from the head; the head's own parameters are left out."""
    # From the top down, so that the lowest layer that uses a parameter has the last word.
    steps = {
        id(parameter): len(layers) - index
        for index, layer in reversed(list(enumerate(layers)))
        for parameter in layer.parameters()
    }
    inside = set(steps)
    tables = {id(p) for module in base.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    is_before = True
    for parameter in base.parameters():  # in the order of their definition
        if id(parameter) in inside:
            is_before = False
        elif is_before or id(parameter) in tables:
            steps[id(parameter)] = len(layers) + 1
    return steps
