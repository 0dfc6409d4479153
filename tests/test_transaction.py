"""What is changed inside a transaction is put back, whatever comes in between."""

from __future__ import annotations

import pytest

from sigswap.errors import UndoError
from sigswap.transaction import Transaction


def noting(done: list[str], name: str, *errors: BaseException) -> tuple[str, object]:
    """A step called ``name`` that raises the ``errors``, one in each of its runs, and then works."""
    left = list(errors)

    def put_back() -> None:
        if left:
            raise left.pop(0)
        done.append(name)

    return name, put_back


def test_what_is_for_a_while_goes_in_any_case() -> None:
    done: list[str] = []
    with Transaction() as undo, undo:
        undo.afterwards(*noting(done, "a"))
        undo.on_failure(*noting(done, "b"))
        undo.afterwards(*noting(done, "c"))
    assert done == ["c", "a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_undoes_all_of_it_the_last_first(error: type[BaseException]) -> None:
    done: list[str] = []
    with pytest.raises(error), Transaction() as undo, undo:
        undo.on_failure(*noting(done, "a"))
        undo.afterwards(*noting(done, "b"))
        raise error
    assert done == ["b", "a"]


def test_the_undo_goes_on_behind_a_step_that_fails_and_names_it() -> None:
    done: list[str] = []
    broken = [OSError("full"), OSError("full")]
    with pytest.raises(KeyError) as caught, Transaction() as undo, undo:
        undo.on_failure(*noting(done, "a"))
        undo.on_failure(*noting(done, "the hooks", *broken))
        raise KeyError
    assert done == ["a"]
    assert caught.value.__notes__ == ["sigswap could not put back the hooks (OSError: full)."]

    with pytest.raises(UndoError, match=r"put back: the modes \(OSError: full\)"), Transaction() as undo, undo:
        undo.afterwards(*noting(done, "b"))
        undo.afterwards(*noting(done, "the modes", *[OSError("full"), OSError("full")]))
    assert done == ["a", "b"]


def test_an_interruption_of_the_undo_waits_for_its_end() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt) as caught, Transaction() as undo, undo:
        undo.on_failure(*noting(done, "a", KeyboardInterrupt()))
        undo.on_failure(*noting(done, "b", KeyboardInterrupt()))
        raise ValueError
    assert done == ["b", "a"] and isinstance(caught.value.__context__, ValueError)
