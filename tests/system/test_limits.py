"""Which names may be stored in a file and shown on a terminal."""

from __future__ import annotations

import pytest

from csqcli.system.limits import check_arguments, check_tree, is_safe_text


@pytest.mark.parametrize(
    "text", ["", "plain", "日本", "a\u00a0b", "\u3000", "zwj\u200d", "zwnj\u200c", "soft\u00adhyphen", "🦉"]
)
def test_letters_of_any_script_with_their_joiners_and_spaces_are_safe(text: str) -> None:
    assert is_safe_text(text)
    check_tree({"name": text}, nodes=10)


@pytest.mark.parametrize(
    "text", ["\x07", "\x1b[2J", "\x85", "\u202e", "\u2066", "\u200f", "\u061c", "\ud800", "\u2028"]
)
def test_control_bidi_surrogate_and_line_characters_are_not(text: str) -> None:
    assert not is_safe_text(f"a{text}b")
    with pytest.raises(ValueError, match="control characters"):
        check_tree({"name": f"a{text}b"}, nodes=10)


def test_texts_may_have_lines_and_tabs_where_names_may_not() -> None:
    assert not is_safe_text("a\nb")
    check_tree({"description": "two\n\tlines"}, nodes=10)


def test_arguments_of_a_constructor_have_names_and_a_blank_after_the_colon() -> None:
    assert check_arguments({"in_chans": 1}) == {"in_chans": 1}
    with pytest.raises(
        ValueError, match=r"^`in_chans:1` is no name of an argument; put a blank after the colon: in_chans: 1$"
    ):
        check_arguments({"in_chans:1": None})
    with pytest.raises(ValueError, match=r"^`a b` is no name of an argument$"):
        check_arguments({"a b": 1})
