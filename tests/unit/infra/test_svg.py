import xml.etree.ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

from infra.svg import style, svg


def drawn(salt="one", label="label"):
    with style():
        figure = Figure(figsize=(2, 1))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 5])
        axes.set_title(label)
        return svg(figure, salt)


def ids(text):
    return {element.get("id") for element in ET.fromstring(text).iter()} - {None}  # noqa: S314


def test_the_same_figure_gives_the_same_bytes():
    assert drawn() == drawn()


def test_ids_of_charts_with_different_salts_do_not_clash():
    assert ids(drawn("one"))
    assert not ids(drawn("one")) & ids(drawn("two"))


def test_an_element_without_prologue_date_or_links():
    text = drawn()
    assert text.startswith("<svg ")
    assert text.rstrip().endswith("</svg>")
    assert "<metadata" not in text and "<?xml" not in text
    assert [piece for piece in text.split('"') if "://" in piece] == ["http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"]


def test_labels_are_escaped_and_stay_text():
    text = drawn(label="<script>$a$ & b")
    assert "<script" not in text
    assert "&lt;script&gt;$a$ &amp; b" in text


def test_the_style_ends_with_its_context():
    before = mpl.rcParams["font.size"], mpl.rcParams["axes.grid"]
    with style():
        assert mpl.rcParams["svg.fonttype"] == "none"
        assert mpl.rcParams["axes.grid"] is True
    assert (mpl.rcParams["font.size"], mpl.rcParams["axes.grid"]) == before
