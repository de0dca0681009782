"""Draws `architecture.svg`: rooms of the package by floors, and what imports what.

Run as `python docs/draw_architecture.py`; a test fails where the drawing is not up to date.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.test_architecture import FLOOR, FLOORS, TREES, rooms_below  # noqa: E402

BOX, GAP, HEIGHT, LEFT = 128, 22, 78, 20
SKIPPED = {"errors", "files", "config_file", "__init__", "__main__"}  # everybody's, and the door


def arrows():
    """Imports from floor to floor, without those that a longer way implies."""
    below = {}
    for module in TREES:
        room = module.split(".")[0]
        if room not in SKIPPED:
            others = {o for o in rooms_below(module) - SKIPPED if FLOOR[o] < FLOOR[room]}
            below.setdefault(room, set()).update(others)

    def reached(room, without):
        seen, left = set(), [room]
        while left:
            for other in below.get(left.pop(), set()) - seen - {without}:
                seen.add(other)
                left.append(other)
        return seen

    return [
        (room, other)
        for room in sorted(below)
        for other in sorted(below[room])
        if not any(other in reached(way, room) for way in below[room] - {other})
    ]


def drawing():
    """The SVG's text."""
    floors = [sorted(r for r in rooms if r not in SKIPPED and r in {m.split(".")[0] for m in TREES})
              for rooms in FLOORS]  # fmt: skip
    floors = [rooms for rooms in floors if rooms]
    width = LEFT * 2 + max(len(rooms) for rooms in floors) * (BOX + GAP)
    height = len(floors) * HEIGHT + 20
    place = {}
    for floor, rooms in enumerate(floors):
        start = (width - len(rooms) * (BOX + GAP) + GAP) / 2
        for index, room in enumerate(rooms):
            place[room] = (start + index * (BOX + GAP), height - (floor + 1) * HEIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="14">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#888"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for room, other in arrows():
        (x1, y1), (x2, y2) = place[room], place[other]
        ends = (x1 + BOX / 2, y1 + 38, x2 + BOX / 2, y2)
        line = 'x1="{:.0f}" y1="{:.0f}" x2="{:.0f}" y2="{:.0f}"'.format(*ends)
        parts.append(f'<line {line} stroke="#888" marker-end="url(#tip)"/>')
    for room, (x, y) in place.items():
        color = "#ffe9c7" if room in ("core", "models") else "#e8eef7"
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="38" rx="6" fill="{color}"'
            ' stroke="#456"/>'
            f'<text x="{x + BOX / 2:.0f}" y="{y + 24:.0f}" text-anchor="middle">{room}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(drawing())
