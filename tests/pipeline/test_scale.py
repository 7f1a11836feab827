"""What counts as evidence of a resolution, and what is refused."""

import csv
import io

import pytest

from pipeline.errors import MissingMpp, TooCoarse
from pipeline.scale import (
    GIVEN_RANGE,
    MPP_RANGE,
    ScaleTags,
    aperio_tags,
    check_resolution,
    csv_line,
    resolution_tags,
    resolve_scale,
)

PLAIN = "Aperio Image Library v12\n46920x33014 [0,100 46000x32914] (256x256) JPEG/RGB Q=30|AppMag = 20"


def tags(x, y=None, objective=None):
    return ScaleTags(x, y, "the tag", objective)


@pytest.mark.parametrize(
    ("x", "y", "mpp"),
    [
        ("0.25", None, 0.25),
        ("0.2525", "0.2525", 0.2525),
        (" 0.499 ", None, 0.499),
        ("5e-1", "0.5", 0.5),
        ("0.05", "0.05", 0.05),
        ("20", "20", 20.0),
        ("0.5", "0.502", 0.501),  # 0.4 %: rounding of a tag
    ],
)
def test_believable_tags_are_taken_without_a_word(x, y, mpp):
    scale = resolve_scale("a.svs", tags(x, y))
    assert scale.mpp == pytest.approx(mpp, rel=1e-12)
    assert scale.source == "tag: the tag"
    assert scale.warnings == ()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (None, None, "does not say"),
        ("", None, "not a number"),
        ("abc", None, "'abc', which is not a number"),
        ("0,5", "0,5", "'0,5', which is not a number"),
        ("0.5", "0,5", "not a number"),
        ("nan", None, "outside the believable"),
        ("inf", None, "outside the believable"),
        ("0", None, "outside the believable"),
        ("-0.499", None, "outside the believable"),
        ("499", None, "outside the believable 0.05-20"),
        ("0.0499", None, "outside the believable"),
        ("20.01", None, "outside the believable"),
        ("0.5", "499", "outside the believable"),
        ("0.5", "nan", "outside the believable"),
        ("0.5", "0.47", "more than 5 %"),  # 6 %
        ("0.47", "0.5", "more than 5 %"),
        ("0.5", "0.25", "more than 5 %"),
    ],
)
def test_other_tags_are_refused_with_the_line_that_helps(x, y, words):
    with pytest.raises(MissingMpp) as caught:
        resolve_scale("folder/a.svs", tags(x, y))
    assert words in caught.value.reason
    assert caught.value.reason.endswith("folder/a.svs,<µm per pixel>")
    assert (caught.value.path, caught.value.stage) == ("folder/a.svs", "open")


@pytest.mark.parametrize(("x", "y"), [("0.5", "0.515"), ("0.515", "0.5"), ("0.5", "0.5262")])
def test_x_and_y_that_differ_a_little_are_averaged_and_told(x, y):
    scale = resolve_scale("a.svs", tags(x, y))
    assert scale.mpp == pytest.approx((float(x) + float(y)) / 2)
    (warning,) = scale.warnings
    assert x in warning
    assert y in warning


@pytest.mark.parametrize(
    ("mpp", "power", "odd"),
    [
        ("0.5", "20", False),
        ("0.25", "40", False),
        ("0.499", "20", False),
        ("0.2525", "40", False),
        ("0.11", "80", False),
        ("0.33", "40", False),  # 30x optics sold as 40x
        ("0.5", "40", True),
        ("0.25", "20", True),
        ("1.0", "40", True),
        ("0.5", None, False),
        ("0.5", "0", False),
        ("0.5", "-20", False),
        ("0.5", "x20", False),
        ("0.5", "nan", False),
    ],
)
def test_an_objective_that_disagrees_is_told_and_not_used(mpp, power, odd):
    scale = resolve_scale("a.svs", tags(mpp, None, power))
    assert scale.mpp == float(mpp)
    assert bool(scale.warnings) == odd
    if odd:
        assert f"{power}x" in scale.warnings[0]


def test_what_is_given_wins_over_every_tag():
    for said in ("0.25", "abc", "nan", "0", "499", None):
        scale = resolve_scale("a.svs", tags(said, "0.4"), 0.5, "csv")
        assert (scale.mpp, scale.source) == (0.5, "csv")
    refused = aperio_tags("0.25", None, "x -> 574x768")
    assert resolve_scale("a.svs", refused, 0.5) == (0.5, "argument", ())


@pytest.mark.parametrize(
    ("said", "told"), [("0.5", False), ("0.52", False), ("0.53", True), ("0.25", True), ("0", True)]
)
def test_a_given_value_that_the_file_contradicts_is_told(said, told):
    scale = resolve_scale("a.svs", tags(said), 0.5, "csv")
    assert bool(scale.warnings) == told
    if told:
        assert "csv says 0.5" in scale.warnings[0]
        assert said in scale.warnings[0]


@pytest.mark.parametrize("given", [0.0, -0.5, float("nan"), float("inf"), GIVEN_RANGE[0] * 0.99, GIVEN_RANGE[1] * 1.01])
def test_a_given_value_has_limits_too(given):
    with pytest.raises(MissingMpp, match="the csv says"):
        resolve_scale("a.svs", tags("0.5"), given, "csv")


@pytest.mark.parametrize("given", [0.01, 28.9685, 165.12, 500.0])
def test_a_person_is_believed_more_than_a_tag(given):
    assert resolve_scale("a.svs", tags(None), given).mpp == given
    assert given < MPP_RANGE[0] or given > MPP_RANGE[1]


def test_a_coarse_format_may_raise_the_limit():
    coarse = ScaleTags("165.12", "165.12", "DICOM PixelSpacing", coarsest=500.0)
    assert resolve_scale("a.dcm", coarse).mpp == 165.12
    with pytest.raises(MissingMpp, match=r"0\.05-500"):
        resolve_scale("a.dcm", ScaleTags("500.1", None, "DICOM PixelSpacing", coarsest=500.0))


@pytest.mark.parametrize("dpi", [72, 96])
def test_the_dpi_of_image_editors_is_no_evidence(dpi):
    for value in (25400 / dpi, 25400 / (dpi + 0.3), 25400 / (dpi - 0.3)):
        with pytest.raises(MissingMpp, match=f"{dpi} dpi"):
            resolve_scale("a.tif", resolution_tags(str(value), str(value)))


@pytest.mark.parametrize("x", ["0.5", "0.2525", "12.7"])
def test_other_resolution_tags_are_evidence(x):
    assert resolve_scale("a.tif", resolution_tags(x, x)).mpp == float(x)


@pytest.mark.parametrize("x", [None, "0", "abc", "nan", "264.0", "250"])
def test_resolution_tags_that_say_nothing(x):
    with pytest.raises(MissingMpp):
        resolve_scale("a.tif", resolution_tags(x, x))


def test_an_aperio_image_made_from_a_slide_has_not_its_resolution():
    assert resolve_scale("a.svs", aperio_tags("0.25", "40", PLAIN)).mpp == 0.25
    with pytest.raises(MissingMpp, match="reduced from"):
        resolve_scale(
            "a.svs", aperio_tags("0.25", "40", "Aperio v12\n46000x32914 -> 1024x732 - |AppMag = 40|MPP = 0.25")
        )
    assert resolve_scale("a.svs", aperio_tags("0.25", "40", PLAIN + "|Note = a -> b")).mpp == 0.25


@pytest.mark.parametrize(
    "path", ["plain.svs", "with space.svs", "a,b.svs", 'a"b.svs', "a\nb.svs", 'a",\n"b.svs', "ünï 切片.svs", "a\rb.svs"]
)
def test_the_line_of_the_message_is_csv(path):
    (row,) = csv.reader(io.StringIO(csv_line(path), newline=""))
    assert row == [path, "<µm per pixel>"]


def test_a_plain_name_is_not_quoted():
    assert csv_line("a b.svs") == "a b.svs,<µm per pixel>"
    with pytest.raises(MissingMpp, match=r'"a,b\.svs",<µm per pixel>'):
        resolve_scale("a,b.svs", tags(None))


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 2.2])
def test_ten_percent_is_where_enlarging_starts(mpp):
    check_resolution("a.svs", mpp * 1.0999, mpp)
    check_resolution("a.svs", mpp / 4, mpp)
    with pytest.raises(TooCoarse) as caught:
        check_resolution("a.svs", mpp * 1.1001, mpp)
    assert "--allow-upsampling" in caught.value.reason
    assert f"--mpp {mpp * 1.1001:g}" in caught.value.reason
    check_resolution("a.svs", mpp * 1.1001, mpp, allow_upsampling=True)


def test_the_value_that_the_message_suggests_is_accepted():
    for slide_mpp in (0.2525, 1.2345678, 28.96849999):
        check_resolution("a.svs", slide_mpp, float(f"{slide_mpp:g}"))
