"""Curves on a logarithmic abscissa, drawn with pillow alone."""

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1b6ca8", "#2e9e5b", "#8a9a1b", "#d98c00", "#c8452f", "#7b3294")
WIDTH, HEIGHT, MARGIN = 620, 420, 70
TICKS = (50, 60, 70, 80, 85, 90, 95, 100)


@dataclass(frozen=True)
class Panel:
    """A picture's half: name of the abscissa, its values, and for each curve its number of GPUs and fractions."""

    name: str
    values: tuple[float, ...]
    curves: list[tuple[int, list[float]]]


def draw(path: Path, title: str, panels: list[Panel]) -> None:
    """Write a PNG of the panels side by side, with one ordinate: percent, from the lowest value down to a tick."""
    least = min(100 * value for panel in panels for _, values in panel.curves for value in values)
    low = max([tick for tick in TICKS if tick <= least] or [0])
    ticks = [tick for tick in (0, *TICKS) if tick >= low]
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for index, panel in enumerate(panels):
        left, right, top, bottom = WIDTH * index + MARGIN, WIDTH * (index + 1) - 90, 40, HEIGHT - 60
        span = math.log(panel.values[-1] / panel.values[0])

        def across(
            value: float, panel: Panel = panel, left: int = left, right: int = right, span: float = span
        ) -> float:
            return left + (right - left) * math.log(value / panel.values[0]) / span

        def down(percent: float, top: int = top, bottom: int = bottom) -> float:
            return bottom - (bottom - top) * (percent - low) / (100 - low)

        for tick in ticks:
            pen.line([(left, down(tick)), (right, down(tick))], fill="#dddddd")
            pen.text((left - 8, down(tick)), str(tick), fill="black", font=font, anchor="rm")
        for value in panel.values:
            pen.line([(across(value), bottom), (across(value), bottom + 4)], fill="black")
            pen.text((across(value), bottom + 8), f"{value:g}", fill="black", font=font, anchor="mt")
        pen.text(((left + right) / 2, HEIGHT - 18), panel.name, fill="black", font=font, anchor="mb")
        pen.text((left, 14), title, fill="black", font=font)
        taken = -math.inf
        for (gpus, values), colour in zip(panel.curves, COLOURS, strict=False):
            points = [(across(x), down(100 * y)) for x, y in zip(panel.values, values, strict=True)]
            pen.line(points, fill=colour, width=2, joint="curve")
            taken = max(taken + 15, points[-1][1])  # names that would lie on each other move down
            pen.text((right + 8, taken), f"{gpus:,} GPUs", fill=colour, font=font, anchor="lm")
    image.save(path)
