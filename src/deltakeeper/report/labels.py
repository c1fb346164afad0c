"""Where the words of a plot go: beside their marks, inside the canvas, off each other, the same place every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FONT = 10.5  # pixels
LINE = 13.0
_WIDE, _NARROW = "mwMW@%—", "iljtfrI1.,:;|'()[] -"


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area in square pixels."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across * down if across > 0 and down > 0 else 0.0

    def within(self, other: Box) -> bool:
        """Whether this box lies wholly inside another."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Label:
    """A word and the centre of the mark it names."""

    text: str
    x: float
    y: float


@dataclass(frozen=True)
class Place:
    """A label's box, and the line that ties it to its mark where it stands too far off to be read as its own."""

    box: Box
    leader: tuple[tuple[float, float], tuple[float, float]] | None


def text_width(text: str) -> float:
    """Estimated width in pixels at `FONT`, generous enough for common system fonts."""
    units = sum(0.95 if c in _WIDE else 0.38 if c in _NARROW else 0.65 for c in text)
    return units * FONT


def place_labels(labels: Sequence[Label], canvas: Box, obstacles: Sequence[Box], radius: float) -> list[Place]:
    """Place each label at the cheapest free spot around its mark, the most crowded marks first.

    Args:
        labels: Words with the centres of their marks.
        canvas: No label leaves it.
        obstacles: Whiskers and the like: crossed only when nothing better is near.
        radius: Radius of the marks in pixels; marks are never covered if any other spot exists.
    """
    marks = [Box(a.x - radius, a.y - radius, a.x + radius, a.y + radius) for a in labels]
    crowd = [sum(math.dist((a.x, a.y), (b.x, b.y)) < 50 for b in labels) for a in labels]
    order = sorted(range(len(labels)), key=lambda i: (-crowd[i], labels[i].y, labels[i].x, i))
    placed: dict[int, Place] = {}
    for index in order:
        label = labels[index]
        taken = [place.box for place in placed.values()]
        lines = [place.leader for place in placed.values() if place.leader]
        options = [
            (_cost(box, distance, marks, taken, obstacles, lines, label), number, box, distance)
            for number, (box, distance) in enumerate(_candidates(label, radius))
            if box.within(canvas)
        ]
        if not options:  # a word wider than the canvas stands as far left as it can
            box = Box(canvas.left, label.y - LINE, canvas.left + text_width(label.text), label.y)
            placed[index] = Place(box, None)
            continue
        _, _, box, distance = min(options)[:4]
        placed[index] = Place(box, _leader(label, box, radius) if distance > radius + 6 else None)
    return [placed[index] for index in range(len(labels))]


def _candidates(label: Label, radius: float) -> list[tuple[Box, float]]:
    width = text_width(label.text)
    found = []
    for distance in (radius + 3, radius + 12, radius + 22, radius + 34, radius + 48, radius + 64, radius + 84):
        for step in range(16):
            angle = step * math.pi / 8
            x, y = label.x + distance * math.cos(angle), label.y + distance * math.sin(angle)
            left = x - width * (1 - math.cos(angle)) / 2
            top = y - LINE * (1 - math.sin(angle)) / 2
            found.append((Box(left, top, left + width, top + LINE), distance))
    return found


def _cost(
    box: Box,
    distance: float,
    marks: Sequence[Box],
    taken: Sequence[Box],
    obstacles: Sequence[Box],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    label: Label,
) -> float:
    cost = distance * 1.5
    cost += sum(60 + 8 * area for other in taken if (area := box.overlap(other)))
    cost += sum(30 + 4 * area for other in marks if (area := box.overlap(other)))
    cost += sum(0.5 * area for other in obstacles if (area := box.overlap(other)))
    cost += sum(40 for line in lines if _crosses(line, box))
    own = _leader(label, box, 0.0)
    gap = math.dist(*own)
    for mark in marks:  # a word nearer to another mark would be read as that mark's name
        centre = Label("", (mark.left + mark.right) / 2, (mark.top + mark.bottom) / 2)
        if (centre.x, centre.y) != (label.x, label.y) and math.dist(*_leader(centre, box, 0.0)) < gap + 3:
            cost += 35
    cost += sum(40 for other in taken if _crosses(own, other))
    return cost


def _leader(label: Label, box: Box, radius: float) -> tuple[tuple[float, float], tuple[float, float]]:
    x = min(max(label.x, box.left), box.right)
    y = min(max(label.y, box.top + 2), box.bottom - 2)
    length = math.dist((label.x, label.y), (x, y)) or 1.0
    start = (label.x + (x - label.x) * radius / length, label.y + (y - label.y) * radius / length)
    return start, (x, y)


def _crosses(line: tuple[tuple[float, float], tuple[float, float]], box: Box) -> bool:
    (x1, y1), (x2, y2) = line
    inner = Box(box.left + 1, box.top + 1, box.right - 1, box.bottom - 1)
    for step in range(13):
        x, y = x1 + (x2 - x1) * step / 12, y1 + (y2 - y1) * step / 12
        if inner.left < x < inner.right and inner.top < y < inner.bottom:
            return True
    return False
