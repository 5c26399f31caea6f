"""How figures look: colours, symbols, axes. Plain values that are fit for JSON."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, darker where they are thin on white: told apart by colour-blind people
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5589a", "#c98a00", "#3aa0d8")
OTHERS = "#a3abb6"  # of the series after those
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
TEXT, MUTED, GRID, PAPER = "#1b1f24", "#5d6570", "#e4e7eb", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
HEIGHT = 400  # pixels
FILL = 0.16  # opacity of a band
DARK = {  # colour -> the one on dark paper
    "#0072b2": "#4ba3e3", "#d55e00": "#ff8f4d", "#009e73": "#2cc295", "#b5589a": "#e296c8",
    "#c98a00": "#efb93f", "#3aa0d8": "#9ad4f5", OTHERS: "#5f6874",
    TEXT: "#e8eaed", MUTED: "#9aa3af", GRID: "#2c323b", PAPER: "#14171c",
}  # fmt: skip

Figure = dict[str, Any]  # of plotly: `data` and `layout`


def colour(place: int) -> str:
    """Return the colour of a group by its place, the best first."""
    return COLOURS[place] if place < len(COLOURS) else OTHERS


def symbol(place: int) -> str:
    """Return the marker of a group by its place."""
    return SYMBOLS[place] if place < len(SYMBOLS) else "circle"


def translucent(hex_colour: str, alpha: float) -> str:
    """Return a colour `#rrggbb` as `rgba(...)`."""
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def plain(text: object) -> str:
    """Return a text that plotly shows as it is: plotly reads tags and line breaks in texts."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())


def rounded(value: float) -> float:
    """Return a number with the five digits that a chart can show."""
    return float(f"{value:.5g}")


def figure(title: str, caption: str, data: list[dict[str, Any]], **layout: Any) -> Figure:
    """Return a figure with our look; `layout.meta` has its title and caption."""
    return {
        "data": data,
        "layout": {
            "meta": {"title": title, "caption": caption},
            "title": {"text": title},
            "height": HEIGHT,
            "hovermode": "closest",
            "template": {"layout": _template()},
            **layout,
        },
    }


def _template() -> dict[str, Any]:
    axis = {
        "gridcolor": GRID, "linecolor": GRID, "zeroline": False, "automargin": True,
        "ticks": "", "tickfont": {"color": MUTED},
        "title": {"standoff": 12, "font": {"size": 13, "color": MUTED}},
    }  # fmt: skip
    return {
        "font": {"family": FONT, "size": 13, "color": TEXT},
        "title": {"x": 0, "xref": "paper", "font": {"size": 17}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(COLOURS),
        "margin": {"l": 56, "r": 16, "t": 48, "b": 48},
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": GRID, "font": {"color": TEXT}},
        "legend": {"orientation": "h", "y": -0.2, "font": {"color": MUTED}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": OTHERS, "activecolor": TEXT},
        "xaxis": {**axis, "showgrid": False, "showline": True},
        "yaxis": axis,
    }
