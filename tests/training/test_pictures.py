"""Pictures of reports: what is checked before one is drawn, and what is in the file."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import NoReturn

import pytest

from sigswap.errors import ArgumentError
from sigswap.training.pictures import save_picture

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", ["heads.txt", "heads", "nowhere/heads.png", "nowhere/heads.html"])
def test_what_cannot_be_written_is_not_drawn(name: str, tmp_path: Path) -> None:
    def draw() -> NoReturn:
        raise AssertionError

    with pytest.raises(ArgumentError, match=re.escape(name)):
        save_picture(tmp_path / name, draw, shown="", title="", parts=[])
    assert not list(tmp_path.iterdir())


def test_a_page_holds_the_picture(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for name in ("one.PNG", "one.html"):
        save_picture(str(tmp_path / name), lambda: Figure((1, 1)), shown="a < b", title="One", parts=["below"])
    page = (tmp_path / "one.html").read_text()
    (encoded,) = re.findall(r'alt="a &lt; b" src="data:image/png;base64,([^"]+)"', page)
    picture = (tmp_path / "one.PNG").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64decode(encoded) == picture
    assert page.index("One") < page.index(encoded) < page.index("below")
