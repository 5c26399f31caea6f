"""The look of figures: colours, and texts that plotly must not read."""

from __future__ import annotations

from lora_exp.comparison.theme import COLOURS, OTHERS, colour, figure, plain, symbol, translucent


def test_texts_are_shown_as_they_are() -> None:
    assert plain("<b>a</b>\n&<a href='x'>") == "&lt;b&gt;a&lt;/b&gt; &amp;&lt;a href='x'&gt;"


def luminance(hex_colour: str) -> float:
    """As WCAG 2 computes it."""
    parts = (int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_stand_out_from_the_paper_and_groups_after_them_are_grey() -> None:
    for hex_colour in COLOURS:
        assert 1.05 / (luminance(hex_colour) + 0.05) > 2.7
    assert [colour(0), colour(len(COLOURS))] == [COLOURS[0], OTHERS]
    assert len({symbol(place) for place in range(len(COLOURS))}) == len(COLOURS)
    assert translucent("#0072b2", 0.5) == "rgba(0,114,178,0.5)"


def test_a_figure_is_one_for_plotly_too() -> None:
    from plotly.graph_objects import Figure

    made = Figure(figure("Title", "Caption", [{"type": "scatter", "x": [1], "y": [2]}], height=300))
    assert (made.layout.title.text, made.layout.height) == ("Title", 300)
