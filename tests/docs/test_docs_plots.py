"""What is written into the plots of measurements stays in its frame and can be read."""

import pytest
from matplotlib.text import Annotation

from bench import plot, readme
from bench.row import latest, read


def committed():
    return [row for path in sorted(readme.RESULTS.glob("*.csv")) for row in read(path)]


@pytest.mark.parametrize("name", plot.FIGURES)
def test_words_stay_in_their_frame(name):
    rows, checked = committed(), 0
    devices = dict.fromkeys(row.device for row in rows)
    for device in devices:
        figure = plot.FIGURES[name](list(latest(r for r in rows if r.device == device).values()))
        if figure is None:
            continue
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        for axes in figure.axes:
            frame = axes.get_window_extent(renderer)
            for note in axes.findobj(Annotation):
                box = note.get_window_extent(renderer)
                assert frame.x0 <= box.x0 and box.x1 <= frame.x1, note.get_text()
            for axis, low, high in ((axes.yaxis, "y0", "y1"), (axes.xaxis, "x0", "x1")):
                labels = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
                boxes = [label.get_window_extent(renderer) for label in labels]
                boxes = [b for b in boxes if frame.x0 - b.width <= b.x1 and b.x0 <= frame.x1]
                boxes.sort(key=lambda box: getattr(box, low))
                for below, above in zip(boxes, boxes[1:], strict=False):
                    assert getattr(below, high) <= getattr(above, low) + 1
        checked += 1
    assert checked


def test_the_roof_falls_where_memory_ends():
    """Its left part rises with the bytes, its right part is flat: three points in order."""
    rows = [r for r in committed() if r.device != "meta"]
    figure = plot.FIGURES["roofline"](list(latest(rows).values()))
    xs, ys = figure.axes[0].lines[0].get_data()
    assert xs[0] < xs[1] < xs[2] and ys[0] < ys[1] and ys[1] == pytest.approx(ys[2])
