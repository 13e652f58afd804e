"""The film of a crosscoder's latents as an animated SVG."""

import xml.etree.ElementTree as ElementTree

import explorer_toy as toy
import numpy as np
import pytest

from bridge.run import timelines
from bridge.run.timelines import Timeline
from bridge.stages import film

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def timeline(tmp_path) -> Timeline:
    toy.write_store(tmp_path, stage="sft")
    toy.write_stages(tmp_path)
    found = timelines.read(tmp_path, toy.HOOK)
    assert found is not None
    return found


def animations(dot: ElementTree.Element) -> dict[str, list[str]]:
    return {one.get("attributeName"): one.get("values").split(";") for one in dot.iter(f"{SVG}animate")}


def test_every_living_latent_is_a_dot_that_moves_appears_and_dies(timeline):
    picture = ElementTree.fromstring(film.svg(timeline, "a <b> & c"))
    assert picture.find(f"{SVG}title").text == "a <b> & c"
    dots = list(picture.iter(f"{SVG}circle"))
    assert len(dots) == toy.D_SAE - 1  # without the dead one
    latents = [latent for latent in range(toy.D_SAE) if latent != toy.DEAD]
    by_latent = dict(zip(latents, dots, strict=True))
    assert animations(by_latent[toy.ORDINARY]) == {}
    assert animations(by_latent[toy.HOSTILE])["opacity"] == ["0", "0", "0.9", "0.9", "0.9", "0.9"]
    assert animations(by_latent[toy.SPLIT])["opacity"][-1] == "0"
    assert animations(by_latent[toy.EMPTY])["opacity"][:4] == ["0.25"] * 4
    assert len(set(animations(by_latent[toy.ONCE])["fill"])) == 2  # it turns
    times = [float(time) for time in next(by_latent[toy.SPLIT].iter(f"{SVG}animate")).get("keyTimes").split(";")]
    assert times[0] == 0
    assert times[-1] == 1
    assert times == sorted(times)


def test_names_are_text_and_every_one_is_shown(timeline):
    hostile = Timeline(
        ["<script>", "b", "c"], *(getattr(timeline, name) for name in ("steps", "kinds", "events")), timeline.measures
    )
    words = [text.text for text in ElementTree.fromstring(film.svg(hostile, "t")).iter(f"{SVG}text")]
    assert {"<script>", "b", "c"} <= set(words)


def test_what_happens_is_said_in_every_checkpoint(timeline):
    words = [text.text for text in ElementTree.fromstring(film.svg(timeline, "t")).iter(f"{SVG}text")]
    assert words[-4:] == ["step-100", "1 appear", "sft", "2 appear, 1 rotate, 1 die"]


def test_a_contribution_is_the_norm_of_what_is_written_where_a_latent_fires(timeline):
    timeline.measures["own_mean"] = np.full_like(timeline.measures["own_mean"], 3)
    timeline.measures["corrected_norm"][toy.ORDINARY] = [0.1, 0.2, 0.3]
    np.testing.assert_allclose(timeline.contribution[toy.ORDINARY], [0.3, 0.6, 0.9])


def test_the_same_timeline_gives_the_same_bytes(timeline):
    assert film.svg(timeline, "t") == film.svg(timeline, "t")


def test_there_is_no_film_of_latents_that_never_fire(timeline):
    timeline.measures["own_density"] = np.zeros_like(timeline.measures["own_density"])
    with pytest.raises(ValueError, match="no latent fires"):
        film.svg(timeline, "t")


def test_a_change_is_the_distance_of_two_directions(timeline):
    change = timeline.change
    assert change.shape == (toy.D_SAE, 3)
    np.testing.assert_array_equal(change[:, 0], 0)
    np.testing.assert_allclose(change[toy.ONCE, 2], np.sqrt(2 - 2 * 0.2))
    np.testing.assert_allclose(change[toy.BLANKS], [0, 0, 1])
