"""The model without the wrappers that check types in tests, which no compiler meets in use."""

import inspect
import types

import pytest

from bridge.nanochat import attention
from bridge.nanochat import model as model_module
from bridge.nanochat.model import GPT, MLP, Attention, Block


def uncheck(patch: pytest.MonkeyPatch) -> None:
    """Call the functions of a forward pass without their wrappers until the patch is undone."""
    for holder in (attention, model_module, Attention, MLP, Block, GPT):
        for name, function in list(vars(holder).items()):
            if isinstance(function, types.FunctionType) and name != "init_weights":
                patch.setattr(holder, name, inspect.unwrap(function))
