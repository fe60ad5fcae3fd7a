"""The colours of every plot and picture, and the style of pictures."""

from __future__ import annotations

from typing import Any

# Okabe & Ito's palette, which the colour-blind can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, ORANGE = COLORS[:2]
GREY, DARK_GREY, BLACK = "#C3C9D0", "#7A828C", "#222222"
PICTURE_STYLE: Any = {
    "font.size": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""The style of pictures in documents, for `matplotlib.rc_context`; the plots of a report have their own."""
