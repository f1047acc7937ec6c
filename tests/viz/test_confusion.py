from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from peft_bsr.errors import InputError
from peft_bsr.viz import draw_confusion
from peft_bsr.viz.fonts import families_for


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(counts, names)`: the axis that was drawn, as it was saved."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), real(self, *a, **k)))

    def call(counts, names):
        path = draw_confusion(counts, names, tmp_path / "confusion.png")
        with Image.open(path) as image:
            assert image.width > 100
        return figures[-1].axes[0]

    return call


def test_names_counts_and_shares(drawn):
    axis = drawn([[3, 1, 0], [0, 0, 0], [0, 2, 0]], ["$a_{", "b", "a name that is far too long to be read"])
    names = ["$a_{", "b", "a name that is far to..."]
    assert [text.get_text() for text in axis.get_yticklabels()] == names
    assert [text.get_text() for text in axis.texts] == ["3", "1", "0", "0", "0", "0", "0", "2", "0"]
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0, 1, 0]])


def test_classes_that_nobody_saw_are_left_out(drawn):
    counts = np.zeros((200, 200), int)
    counts[3, 3], counts[3, 150] = 5, 1
    axis = drawn(counts.tolist(), [f"class {number}" for number in range(200)])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["class 3", "class 150"]


def test_what_cannot_be_read_is_not_drawn(tmp_path):
    with pytest.raises(InputError, match="60 classes are too many"):
        draw_confusion(np.eye(60, dtype=int).tolist(), [str(n) for n in range(60)], tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_letters_that_no_font_has_become_numbers(drawn):
    nobody = chr(0x10FFFD)  # for private use
    assert families_for(["été"])[1]
    assert not families_for([nobody])[1]
    axis = drawn([[1, 0], [0, 1]], [nobody, "b"])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "1"]
