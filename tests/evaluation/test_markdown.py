from __future__ import annotations

from personalized_soups.evaluation.markdown import plain, table


def test_text_is_shown_as_it_is() -> None:
    assert plain("a|b *c* <d> `e` \\ # $f$") == r"a\|b \*c\* \<d\> \`e\` \\ \# \$f\$"
    assert plain(" one \n two\n") == "one<br>two"
    assert plain("factor_average _x_") == r"factor_average \_x\_"


def test_words_stand_left_and_numbers_right() -> None:
    assert table(["name", "n"], [["a", "1"], ["longer", "22"]]) == (
        "| name   |   n |\n| ------ | --: |\n| a      |   1 |\n| longer |  22 |"
    )
