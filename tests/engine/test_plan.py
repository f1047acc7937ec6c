from __future__ import annotations

import pytest

from peft_bsr.engine import Plan, Reduction


def paper_plan(**reduction: object) -> Plan:
    return Plan.static(12, [3, 7, 11], {i: Reduction(0.5, **reduction) for i in (3, 6, 9)})


def test_token_counts_of_the_paper():
    counts = paper_plan().token_counts(197, 1)
    assert [mlp for _, mlp in counts] == [197] * 3 + [100] * 3 + [52] * 3 + [28] * 3
    assert [attention for attention, _ in counts] == [197] * 4 + [100] * 3 + [52] * 3 + [28] * 2


def test_token_counts_without_fusing():
    assert [mlp for _, mlp in paper_plan(fuse=False).token_counts(197, 1)][::3] == [197, 99, 50, 26]


def test_reducing_after_the_block_leaves_its_mlp_all_tokens():
    counts = paper_plan(position="after_block").token_counts(197, 1)
    assert counts[3] == (197, 197)
    assert counts[4] == (100, 100)


def test_prefix_tokens_do_not_compete():
    assert Reduction(0.5).count_after(5 + 10, num_special=5) == 5 + 5 + 1


def test_nothing_is_fused_where_nothing_is_dropped():
    assert Reduction(0.99).count_after(1 + 3, num_special=1) == 4


def test_the_gradient_is_cut_up_to_the_first_trained_block():
    assert [block.cut_gradient for block in paper_plan().blocks] == [True] * 4 + [False] * 8


def test_plans_are_values():
    assert paper_plan() == paper_plan()
    assert hash(paper_plan()) == hash(paper_plan())
    with pytest.raises(AttributeError):
        paper_plan().blocks = ()


def test_describe_has_a_line_for_each_block():
    lines = paper_plan().describe(197, 1).splitlines()
    assert lines[0] == "compact, tokens ranked by class"
    assert len(lines) == 14
    assert lines[5].split() == ["3", "trained", "197", "100"]
