"""Pictures show Layout's maps: the coloured boxes are checked against the definitions, box by box."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from registered import SCALE, registered

from numbanorm.cli import figures
from numbanorm.cli.explain import Case, Reading, textbook
from numbanorm.cli.figures import MEAN, OTHER, WEIGHT, Block, draw, save

# (norm, shape, channel axis, options, shares the first mean, shares the first weight), of the indices n, c, s where s
# counts along the space axes: written from the definitions of the papers.
DEFINITIONS = [
    ("batch", (4, 6, 2, 4), 1, {}, lambda n, c, s: c == 0, lambda n, c, s: c == 0),
    ("layer", (4, 6, 2, 4), 1, {}, lambda n, c, s: n == 0, lambda n, c, s: (c == 0) & (s == 0)),
    ("rms", (4, 6, 2, 4), 1, {}, lambda n, c, s: n == 0, lambda n, c, s: (c == 0) & (s == 0)),
    ("l2", (4, 6, 2, 4), 1, {}, lambda n, c, s: n == 0, lambda n, c, s: (c == 0) & (s == 0)),
    ("scale", (4, 6, 2, 4), 1, {}, lambda n, c, s: n == 0, lambda n, c, s: n >= 0),
    ("scale", (4, 6, 8), -1, {}, lambda n, c, s: (n == 0) & (s == 0), lambda n, c, s: n >= 0),
    ("instance", (4, 6, 2, 4), 1, {}, lambda n, c, s: (n == 0) & (c == 0), lambda n, c, s: c == 0),
    ("group", (4, 6, 2, 4), 1, {"num_groups": 2}, lambda n, c, s: (n == 0) & (c < 3), lambda n, c, s: c == 0),
    ("group", (4, 2, 4, 6), -1, {"num_groups": 3}, lambda n, c, s: (n == 0) & (c < 2), lambda n, c, s: c == 0),
    ("layer", (4, 6, 8), -1, {}, lambda n, c, s: (n == 0) & (s == 0), lambda n, c, s: c == 0),
    ("batch", (4, 6, 8), -1, {}, lambda n, c, s: c == 0, lambda n, c, s: c == 0),
    ("batch", (4, 6, 8), 1, {}, lambda n, c, s: c == 0, lambda n, c, s: c == 0),
    (
        "layer",
        (4, 6, 2, 4),
        1,
        {"axis": (3,)},
        lambda n, c, s: (n == 0) & (c == 0) & (s < 4),
        lambda n, c, s: s % 4 == 0,
    ),
    ("layer", (4, 6, 2, 4), 1, {"axis": (1,)}, lambda n, c, s: (n == 0) & (s == 0), lambda n, c, s: c == 0),
    ("batch", (6, 4, 3), 0, {}, lambda n, c, s: c == 0, lambda n, c, s: c == 0),
    ("layer", (5, 7), 1, {}, lambda n, c, s: n == 0, lambda n, c, s: c == 0),
    ("batch", (5, 7), 1, {}, lambda n, c, s: c == 0, lambda n, c, s: c == 0),
]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered(SCALE):
        yield


@pytest.mark.parametrize(("norm", "shape", "channel_axis", "options", "mean", "weight"), DEFINITIONS)
def test_block_follows_the_definition(norm, shape, channel_axis, options, mean, weight):
    reading = Reading.of(shape, channel_axis)
    block = Block.of(Case.of(norm, reading, **options))
    n, c, s = np.indices(block.statistic.shape)
    assert block.statistic.shape == (
        shape[reading.sample],
        shape[reading.channel],
        math.prod(shape) // shape[reading.sample] // shape[reading.channel],
    )
    np.testing.assert_array_equal(block.statistic == 0, mean(n, c, s))
    np.testing.assert_array_equal(block.weight == 0, weight(n, c, s))


def coloured(figure: Figure, which: str, colour: str) -> list[int]:
    """Count boxes of a colour, in whatever light, on the three sides of each block that shows `which`."""
    sides = [c for axes in figure.axes for c in axes.collections if isinstance(c, PolyCollection)]
    hues = [hue(side.get_facecolor()[:, :3]) for side in sides if side.get_gid() == which]
    return [int(np.isclose(found, hue(np.array(to_rgb(colour)))).all(-1).sum()) for found in hues]


def hue(colours: np.ndarray) -> np.ndarray:
    return colours / colours.max(-1, keepdims=True)


# Sides in sight: (N, C) above, (N, space) on the left, (C, space) on the right; of 4 samples, 6 channels, 8 positions.
@pytest.mark.parametrize(
    ("norm", "mean", "weight"),
    [
        ("batch", [4, 4 * 8, 8], [4, 4 * 8, 8]),
        ("layer", [6, 8, 6 * 8], [4, 4, 1]),
        ("instance", [1, 8, 8], [4, 4 * 8, 8]),
        ("group", [3, 8, 3 * 8], [4, 4 * 8, 8]),
        ("l2", [6, 8, 6 * 8], [4, 4, 1]),
        ("scale", [6, 8, 6 * 8], [4 * 6, 4 * 8, 6 * 8]),
    ],
)
def test_picture_colours_the_boxes_in_sight(norm, mean, weight):
    figure = draw([Case.of(norm, Reading.of((4, 6, 8, 8)), num_groups=2 if norm == "group" else None)])
    assert coloured(figure, "statistic", MEAN) == mean
    assert coloured(figure, "weight", WEIGHT) == weight
    rest = [total - some for total, some in zip([4 * 6, 4 * 8, 6 * 8], mean, strict=True)]
    assert coloured(figure, "statistic", OTHER) == rest


def test_boxes_lie_where_their_indices_say():
    """The coloured box of a batch norm's channel, on the upper side, is the first along C and any along N."""
    figure = draw([Case.of("batch", Reading.of((2, 3)))])
    upper = figure.axes[0].collections[0]
    assert isinstance(upper, PolyCollection)
    centres = np.array([path.vertices[:4].mean(0) for path in upper.get_paths()])
    blue = np.isclose(upper.get_facecolor()[:, :3], to_rgb(MEAN)).all(1)
    along_c = centres @ np.linalg.pinv(figures._STEPS[:2])[:, 1]
    np.testing.assert_array_equal(blue, along_c < 1)
    assert blue.sum() == 2


def test_lines_separate_every_group():
    """Six channels of batch norm: five lines on each side that shows the channels, none on the one that does not."""
    figure = draw([Case.of("batch", Reading.of((4, 6, 8, 8)))])
    lines = [len(c.get_segments()) for c in figure.axes[0].collections if not isinstance(c, PolyCollection)]
    assert lines == [5 * 4, 0, 5 * 8]


def texts(figure: Figure) -> str:
    legends = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    inside = [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title)]
    return "\n".join([*legends, *inside, *(text.get_text() for text in figure.texts)])


def test_picture_says_what_is_shared():
    words = texts(draw([Case.of("group", Reading.of((64, 256, 56, 56)), num_groups=32)]))
    assert "GroupNorm (32 groups) of an array (N, C, H, W) = (64, 256, 56, 56)" in words
    assert "these 25,088 elements share one mean;\n2,048 means and 2,048 variances in all" in words
    assert "these 200,704 elements share one weight;\n256 weights and 256 biases in all" in words
    for label in ("N: 64 samples", "C: 256 channels", "H·W: 3,136 positions"):
        assert label in words
    assert "8 of 64 along N, 8 of 256 along C, 2 of 56 along H, 4 of 56 along W" in words


def test_picture_of_tokens_names_their_axes():
    words = texts(draw([Case.of("layer", Reading.of((4, 6, 8), -1))]))
    for label in ("N: 4 sentences", "sentence position: 6", "embedding: 8"):
        assert label in words
    assert "Drawn" not in words


def test_picture_of_rms_has_no_mean_and_no_bias():
    words = texts(draw([Case.of("rms", Reading.of((4, 6)))]))
    assert "share one mean square" in words
    assert "variance" not in words
    assert "bias" not in words


def test_picture_of_l2_norm_says_what_it_divides_by():
    words = texts(draw([Case.of("l2", Reading.of((4, 6)))]))
    assert "Which elements share a Euclidean norm?" in words
    assert "summing over C" in words
    assert "these 6 elements share one Euclidean norm;\n4 Euclidean norms in all" in words


def test_picture_of_a_registered_norm_with_one_weight():
    words = texts(draw([Case.of(norm, Reading.of((4, 6))) for norm in textbook("scale")]))
    assert "GroupNorm (2 groups) and ScaleNorm" in words
    assert "these 24 elements share one weight;\n1 weight in all" in words


@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (1000, 1), (9, 9, 9), (2, 16, 3, 5, 7), (3, 4, 2, 2, 2, 2, 2)])
def test_at_most_eight_boxes_along_an_edge(shape):
    for norm in textbook():
        block = Block.of(Case.of(norm, Reading.of(shape)))
        assert max(block.statistic.shape) <= figures.MOST
        for pick, length in zip(block.picks, shape, strict=True):
            assert pick[0] == 0
            assert list(pick) == sorted(set(pick))
            assert pick[-1] < length


def test_a_group_of_many_channels_is_drawn_with_several():
    block = Block.of(Case.of("group", Reading.of((2, 64, 3, 3)), num_groups=16), groups=16)
    assert Counter(block.statistic[0, :, 0].tolist()) == {0: 4, 15: 4}


@pytest.mark.parametrize("suffix", [".png", ".PNG"])
def test_png_has_the_colours(tmp_path: Path, suffix):
    path = tmp_path / f"picture{suffix}"
    save(draw([Case.of("layer", Reading.of((4, 6, 8, 8)))]), path)
    pixels = matplotlib.image.imread(path, format="png")[..., :3]
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    left, right = np.array_split(pixels, 2, axis=1)
    # The first mean covers 6 of the 24 boxes above, the first weight 4 of them.
    for half, colour, other in ((left, MEAN, WEIGHT), (right, WEIGHT, MEAN)):
        assert np.isclose(half, to_rgb(colour), atol=0.01).all(-1).sum() > 1000
        assert not np.isclose(half, to_rgb(other), atol=0.01).all(-1).any()


def test_svg_has_the_colours(tmp_path: Path):
    path = tmp_path / "picture.svg"
    save(draw([Case.of("batch", Reading.of((4, 6)))]), path)
    text = path.read_text()
    assert text.lstrip().startswith("<?xml")
    assert text.count(f"fill: {MEAN}") == 4 + 1  # the boxes above, and the legend
    assert text.count(f"fill: {WEIGHT}") == 4 + 1


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_same_picture_same_file(tmp_path: Path, suffix):
    contents = []
    for name in "ab":
        path = tmp_path / f"{name}{suffix}"
        save(draw([Case.of("batch", Reading.of((2, 3)))]), path)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_norms_side_by_side():
    figure = draw([Case.of(norm, Reading.of((4, 6, 8, 8))) for norm in textbook()])
    assert len(figure.axes) == 8
    assert coloured(figure, "statistic", MEAN) == [4, 32, 8, 6, 8, 48, 1, 8, 8, 3, 8, 24]
    assert coloured(figure, "weight", WEIGHT) == [4, 32, 8, 4, 4, 1, 4, 32, 8, 4, 32, 8]
