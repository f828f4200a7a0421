"""A transformer with whole weights on one device, for sampling in one process."""

from dataclasses import replace

import torch
from torch import Tensor

from framework.batch import Condition, Tokens
from framework.kernels.attention import build_attention
from framework.models.dit import DiT
from framework.parallel.zero.engine import predict
from framework.recipe import Recipe, resolve_auto


class LocalModel:
    """The Predictor of this file."""

    def __init__(self, model: DiT) -> None:
        self._model = model
        self._dtype = next(model.parameters()).dtype

    def __call__(self, tokens: Tokens, condition: Condition) -> Tensor:
        return predict(self._model, tokens, condition, self._dtype)


def empty_model(recipe: Recipe) -> DiT:
    """The recipe's transformer on the meta device, with the attention kernel that this machine has: the run's may need
    a GPU or a package that isn't here.
    """
    here = resolve_auto(replace(recipe, attention=replace(recipe.attention, kernel="auto")))
    with torch.device("meta"):
        return DiT(recipe.model, build_attention(here.attention), rope=recipe.rope)
