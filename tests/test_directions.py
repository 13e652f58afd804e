"""The map of decoder directions."""

import numpy as np

from bridge.explorer import directions


def test_latents_that_write_alike_are_neighbours_on_the_map():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16))
    group = np.repeat(np.arange(4), 30)
    lengths = rng.uniform(0.1, 10, size=(120, 1))  # directions count, lengths do not
    places = directions.project(lengths * (centres[group] + 0.2 * rng.normal(size=(120, 16))))
    assert places.shape == (120, 2)
    np.testing.assert_array_equal([places.min(axis=0), places.max(axis=0)], [[0, 0], [1, 1]])
    distances = np.linalg.norm(places[:, None] - places, axis=2) + np.eye(120) * 9
    assert (group[distances.argmin(1)] == group).all()


def test_what_no_map_is_drawn_of(monkeypatch):
    assert directions.project(np.eye(7)) is None
    assert np.isfinite(directions.project(np.zeros((9, 4)))).all()
    monkeypatch.setattr(directions, "MOST", 8)
    assert directions.project(np.eye(9)) is None
