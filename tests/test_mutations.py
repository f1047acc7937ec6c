"""The mutations of `mutations.py`, which runs by hand, still apply to the code."""

from __future__ import annotations

import pytest

from tests.mutations import INVARIANT, mutations


def test_mutations_apply():
    assert [f"{m.file}: {m.problem}" for m in mutations([]) if m.problem] == []
    assert {(m.file, m.why) for m in mutations([])} >= set(INVARIANT), "all of tests/invariant's are there"


@pytest.mark.parametrize("text", ["no such text", "import"])
def test_a_stale_mutation_is_seen(text):
    first = mutations(["core/route"])[0]
    assert "not once" in str(type(first)(first.file, text, "", "").problem)
