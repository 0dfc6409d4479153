"""Errors as data: a message with its argument, and a hint, in Python's words and in other ones."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from torch import nn

import sigswap
from sigswap import errors
from sigswap.errors import ArgumentError, Hint, SigswapError, UnswappableSiteError

HINT = Hint(
    "Pass {strict} to leave {what} as softmax, or {exclude} to say which.", {"strict": "False", "exclude": "[...]"}
)
CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SigswapError)]


def test_python_writes_arguments_as_a_call_does() -> None:
    error = UnswappableSiteError("{argument}: layers.0 cannot be swapped.", argument="model", hint=HINT)
    assert error.message == "model: layers.0 cannot be swapped."
    assert str(error.hint) == "Pass strict=False to leave {what} as softmax, or exclude=[...] to say which."
    assert str(error) == f"{error.message} {error.hint}"


def test_another_spelling_of_the_same_data() -> None:
    error = ArgumentError("{argument} holds 'x'.", argument="exclude", hint=HINT)
    assert error.spelled(lambda name, value: f"<{name}{value}>") == "<exclude> holds 'x'."
    assert HINT.spelled(lambda name, value: f"<{name}:{value}>").startswith("Pass <strict:False> to leave {what}")


def test_braces_of_a_users_value_are_kept() -> None:
    assert str(ArgumentError(f"options={ {'a': 1} } has {{argument}}s.")) == "options={'a': 1} has {argument}s."
    assert (
        str(ArgumentError("100%, {} and {0}", hint=Hint("{} {0} {x}", {"x": "{y}"}))) == "100%, {} and {0} {} {0} x={y}"
    )


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_are_copied_and_pickled_whole(cls: type[SigswapError], copied: object) -> None:
    error = cls("{argument} is wrong.", argument="exclude", hint=HINT)
    again = copied(error)  # type: ignore[operator]
    assert type(again) is cls and again is not error
    assert (str(again), again.argument, again.hint) == (str(error), "exclude", HINT)


def test_a_raised_error_has_them() -> None:
    with pytest.raises(errors.ExampleInputsError) as raised:
        sigswap.convert(nn.Linear(2, 2), example_inputs=[])
    assert raised.value.argument == "example_inputs"
    assert raised.value.hint is not None and raised.value.hint.values == {"example_inputs": ""}
    assert str(raised.value).startswith("example_inputs is an empty list. Pass example_inputs: a tensor, a tuple of")
