"""Draws docs/panel-*.svg: the live panel, at three widths, in the middle of a run. `python docs/make_panel.py`

The events are made up and the clock stands still, so that the pictures change only when the panel does.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from auvsum.budget import ResolvedBudget
from auvsum.errors import DocumentBinary
from auvsum.events import DocumentDone, DocumentFailed, DocumentStarted, Event, Prefilled, PrefillProgress, Text, Token
from auvsum.ui import panel
from auvsum.ui.panel import Panel, State

WIDTHS = (60, 100, 200)
DOCS = Path(__file__).parent
MIB = 2**20
SUMMARY = (
    "The report finds that emergency calls rose by nine percent over the year, most of them for medical help and not "
    "for fires. It asks for two more stations in the north of the county, and for one system of dispatch."
)


def started(number: int, name: str) -> DocumentStarted:
    budget = ResolvedBudget("25%", "bytes", 1303, 29 * MIB, 115 * MIB, 5214, False, 30)
    return DocumentStarted(number, name, 5160, 5214, "auv", "stream", budget)


def events() -> list[tuple[float, Event]]:
    """(seconds, event) of a run over a folder: most is behind it, one document is being written."""
    story: list[tuple[float, Event]] = []
    for number in range(11):
        name = f"reports/2025/{number:02}.txt"
        story += [(10.0 * number, started(number, name)), (10.0 * number + 9, DocumentDone(number, name))]
    story.append((110.0, DocumentFailed(11, "reports/scan.txt", DocumentBinary("it is a PDF document"))))
    story.append((110.0, started(12, "reports/2025/fire administration [final].txt")))
    story += [(110 + done / 1700, PrefillProgress(12, min(done, 5214), 5214)) for done in range(512, 5633, 512)]
    story.append((113.4, Prefilled(12, 5214, 3.3, 40 * MIB, 29 * MIB)))
    for number, word in enumerate(SUMMARY.split()):
        story += [(113.5 + number / 41.5, Token(12, number)), (113.5 + number / 41.5, Text(12, f" {word}"))]
    return story


def draw(width: int) -> str:
    """The panel at a width, as SVG."""
    console = Console(
        file=io.StringIO(),
        record=True,
        width=width,
        force_terminal=True,
        color_system="truecolor",
        _environ={},  # the picture does not depend on who draws it
    )
    shown = Panel(console, total=40)
    shown.close()
    clock = [0.0]
    shown.state = State(40, clock=lambda: clock[0])
    for clock[0], event in events():
        shown.hear(event)
    console.export_text()  # forgets what the live display drew
    console.print(shown.render())
    svg = console.export_svg(title="auvsum summarize reports/ -O summaries/", unique_id="panel")
    # Rich names a web font; a picture should fetch nothing.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    return "".join(f"{line.rstrip()}\n" for line in svg.splitlines())


def pictures() -> dict[Path, str]:
    """What belongs in each file."""
    memory = panel.resident_bytes, panel.gpu_bytes
    panel.resident_bytes, panel.gpu_bytes = lambda: 612 * MIB, lambda: None  # type: ignore[assignment]
    try:
        return {DOCS / f"panel-{width}.svg": draw(width) for width in WIDTHS}
    finally:
        panel.resident_bytes, panel.gpu_bytes = memory  # type: ignore[assignment]


if __name__ == "__main__":
    for path, picture in pictures().items():
        path.write_text(picture, encoding="utf-8")
