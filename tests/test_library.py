"""jsae as a library: train on a user's activations of any kind, save, load, resume; what is refused and how."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jsae_toy import TOPK, D, acts_of, config

import bridge
import jsae
from jsae import data, export
from jsae.arrays import PIECE, ArraySource, StreamSource, source_of
from jsae.checkpoint import Checkpoints
from jsae.settings import ConfigError

ROWS = 3000


@pytest.fixture(scope="module")
def acts() -> np.ndarray:
    return acts_of(ROWS)


@pytest.fixture(scope="module")
def trained(acts) -> jsae.TrainedSAE:
    return jsae.train(acts, TOPK, config())


def same(a: jsae.TrainedSAE, b: jsae.TrainedSAE) -> None:
    assert a.weights.keys() == b.weights.keys()
    for name, weight in a.weights.items():
        np.testing.assert_array_equal(weight, b.weights[name], err_msg=name)


# ---- what can be trained on ----------------------------------------------------------------------------------------


def chunks(acts: np.ndarray, size: int = 700):
    return (acts[start : start + size] for start in range(0, len(acts), size))


def mapped(acts: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "acts.npy", acts)
    return np.load(folder / "acts.npy", mmap_mode="r")


SAME_AS_ARRAY = {
    "a memory map": mapped,
    "a jax array": lambda acts, folder: jnp.asarray(acts),
    "float64": lambda acts, folder: acts.astype(np.float64),
    "the other byte order": lambda acts, folder: acts.astype(">f4"),
    "a torch tensor, handed over": lambda acts, folder: bridge.to_jax(torch.from_numpy(acts.copy())),
    "a list of one array": lambda acts, folder: [acts],
    "a source": lambda acts, folder: ArraySource(acts, seed=0),
}


@pytest.mark.parametrize("kind", SAME_AS_ARRAY)
def test_the_same_activations_in_any_form_give_the_same_sae(kind, acts, trained, tmp_path):
    same(jsae.train(SAME_AS_ARRAY[kind](acts, tmp_path), TOPK, config()), trained)


ONE_AFTER_THE_OTHER = {
    "a generator": lambda acts: chunks(np.tile(acts, (7, 1))),
    "a generator function": lambda acts: lambda: chunks(acts, 1100),
    "a chain of lists": lambda acts: itertools.chain(*[list(chunks(acts, 150))] * 7),
    "tuples of one array": lambda acts: ((chunk,) for chunk in chunks(np.tile(acts, (7, 1)))),
    "jax arrays": lambda acts: map(jnp.asarray, chunks(np.tile(acts, (7, 1)))),
}


@pytest.mark.parametrize("kind", ONE_AFTER_THE_OTHER)
def test_arrays_one_after_the_other_are_read_as_the_whole_in_order(kind, acts, trained):
    """The result is that of one array, for pieces of any lengths."""
    whole = jsae.train(ArraySource(acts), TOPK, config())
    same(jsae.train(ONE_AFTER_THE_OTHER[kind](acts), TOPK, config()), whole)
    assert not np.array_equal(whole.W_dec, trained.W_dec)  # which reads in random order


def test_a_dataloader_is_an_iterable_that_begins_again(acts):
    loader = torch.utils.data.DataLoader(list(acts), batch_size=400, collate_fn=np.stack)
    same(jsae.train(loader, TOPK, config()), jsae.train(ArraySource(acts), TOPK, config()))


def test_two_arrays_are_a_transcoders_input_and_target_and_a_crosscoders_layers(acts):
    x, y = acts, acts_of(ROWS, width=24, seed=1)
    transcoder = jsae.train([x, y], jsae.BatchTopK.Config(D, 48, k=3, d_out=24, skip=True), config())
    assert transcoder(x).shape == y.shape
    assert np.square(transcoder(x) - y).mean() < 0.2 * y.var()
    crosscoder = jsae.train(((x, x) for _ in range(7)), jsae.TopK.Config(2 * D, 48, k=3, layers=2), config())
    assert crosscoder.layers == 2
    assert crosscoder.encode(np.concatenate([x, x], 1)).shape == (ROWS, 48)


def test_half_precision_stays_as_it_is_until_it_is_computed_with(acts):
    for dtype in (jnp.bfloat16, np.float16):
        block = drained(source_of(np.asarray(jnp.asarray(acts, dtype)), 0), 512)
        assert block.dtype == dtype
    same(
        jsae.train(acts.astype(np.float16), TOPK, config()),
        jsae.train(acts.astype(np.float16).astype(np.float32), TOPK, config()),
    )


def test_an_iterator_of_just_as_many_rows_as_are_trained_on_is_enough():
    """This holds for blocks of any length; the last one is filled up with its own first rows."""
    acts = acts_of(20_000)
    sae = jsae.train(chunks(acts, 999), TOPK, config(), block_size=3000)
    assert sae.metrics["fvu"] < 0.2
    source = StreamSource(iter([numbered(5)]), total=5)
    np.testing.assert_array_equal(np.asarray(drained(source, 12)).ravel(), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])
    assert source.position() == {"row": 5}


# ---- the order -----------------------------------------------------------------------------------------------------


def drained(source: data.Source, rows: int) -> jax.Array:
    filling = source.fill(rows)
    while True:
        try:
            next(filling)
        except StopIteration as done:
            return done.value


def numbered(rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.float32)[:, None]


@pytest.mark.parametrize("rows", [1, PIECE, PIECE + 1, 5 * PIECE + 17])
def test_every_pass_over_an_array_reads_each_row_once_in_another_order(rows):
    source = ArraySource(numbered(rows), seed=3)
    passes = [np.asarray(drained(source, rows)).ravel() for _ in range(3)]
    for one in passes:
        np.testing.assert_array_equal(np.sort(one), np.arange(rows))
    if rows > 2 * PIECE:
        assert len({one.tobytes() for one in passes}) == 3
        assert not np.array_equal(passes[0], np.arange(rows))
    in_order = ArraySource(numbered(rows))
    np.testing.assert_array_equal(np.asarray(drained(in_order, 2 * rows)).ravel(), np.tile(np.arange(rows), 2))


@pytest.mark.parametrize("seed", [None, 0])
def test_an_array_goes_on_from_any_position(seed):
    rows = 3 * PIECE + 5
    whole = np.concatenate([drained(ArraySource(numbered(rows), seed=seed), 4 * rows)])
    for start in (0, 1, PIECE - 1, PIECE, rows - 1, rows, 2 * rows + 300):
        source = ArraySource(numbered(rows), seed=seed)
        source.seek({"row": start})
        assert source.position() == {"row": start}
        np.testing.assert_array_equal(drained(source, rows), whole[start : start + rows])


def test_a_memory_map_is_read_in_pieces_and_not_whole():
    class Watched:
        shape, dtype, longest, read = (10**8, 4), np.dtype(np.float32), 0, 0

        def __getitem__(self, rows: slice) -> np.ndarray:
            self.longest, self.read = max(self.longest, rows.stop - rows.start), self.read + rows.stop - rows.start
            return np.zeros((rows.stop - rows.start, 4), np.float32)

    watched = Watched()
    drained(ArraySource(watched), 10_000)
    assert (watched.longest, watched.read) == (PIECE, 10_000)


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_it_learns_and_says_how_well(trained, acts):
    assert trained.metrics["fvu"] < 0.2
    assert trained.metrics["l0"] <= 3
    error = np.square(trained(acts) - acts).sum() / np.square(acts - acts.mean(0)).sum()
    assert error == pytest.approx(trained.metrics["fvu"], rel=0.3)
    assert repr(trained).startswith("TrainedSAE(topk, d_in=32, d_sae=64, k=3, fvu=0.1")


def test_reports_come_when_they_are_asked_for_and_after_the_last_step(acts):
    reports = list(jsae.fit(acts, TOPK, config(), report_every=25))
    steps = config().num_steps
    assert [report.step for report in reports] == [*range(25, steps, 25), steps]
    assert reports[-1].metrics["fvu"] < reports[0].metrics["fvu"]
    assert {"learning_rate", "activations_per_second", "dead_fraction"} <= reports[0].metrics.keys()
    assert "FVU" in str(reports[0])


def test_a_report_gives_the_sae_as_it_is_then(acts, trained):
    *_, last = ((report, report.trained()) for report in jsae.fit(acts, TOPK, config(), report_every=50))
    same(last[1], trained)


def test_what_is_saved_is_what_the_export_of_a_run_writes_and_loads_as_it_was(acts, trained, tmp_path):
    *_, last = jsae.fit(acts, TOPK, config())
    metadata = {"model_name": "toy", "hook_name": "blocks.0.hook_resid_post"}
    sae, scale = last.state.sae, np.asarray(last.state.scale)
    export.write(tmp_path / "run", TOPK, sae.arrays(), scale, scale, metadata)
    assert trained.save(tmp_path / "mine", metadata) == tmp_path / "mine"
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    again = jsae.load(tmp_path / "mine")
    same(again, trained)
    assert again.metadata["model_name"] == "toy"
    np.testing.assert_array_equal(again(acts), trained(acts))
    with torch.no_grad():
        theirs = bridge.load_sae(tmp_path / "mine")(torch.from_numpy(acts)).numpy()
    np.testing.assert_allclose(again(acts), theirs, atol=1e-4 * np.abs(acts).max())


def test_saving_again_what_was_loaded_changes_nothing(trained, tmp_path):
    trained.save(tmp_path / "a", {"model_name": "toy"})
    jsae.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_any_optax_transformation_takes_the_place_of_adam(acts, trained):
    own = jsae.train(acts, TOPK, config(), optimizer=optax.adamw(4e-3))
    assert own.metrics["fvu"] < 0.2
    assert "learning_rate" not in own.metrics
    np.testing.assert_allclose(np.linalg.norm(own.W_dec, axis=1), 1, atol=1e-5)
    assert not np.array_equal(own.W_dec, trained.W_dec)


# ---- resuming ------------------------------------------------------------------------------------------------------


def interrupted(acts, folder: Path, after: int, **options) -> None:
    for report in jsae.fit(acts, TOPK, config(), checkpoints=folder, **options):
        if report.step >= after:
            return


EVERY = 40 * 100  # activations: a checkpoint every 40 steps


@pytest.mark.parametrize("kind", ["an array", "a generator function"])
def test_a_run_that_was_interrupted_ends_with_the_same_numbers(kind, acts, tmp_path):
    given = acts if kind == "an array" else lambda: chunks(acts)
    options = {"checkpoint_every": EVERY, "block_size": 1000}
    whole = jsae.train(given, TOPK, config(), checkpoints=tmp_path / "whole", **options)
    for after in (20, 90, 130):
        interrupted(given, tmp_path / "broken", after, **options)
    again = jsae.train(given, TOPK, config(), checkpoints=tmp_path / "broken", **options)
    same(again, whole)
    told = {name for name in whole.metrics if name != "activations_per_second"}
    assert {n: again.metrics[n] for n in told} == {n: whole.metrics[n] for n in told}
    finished = jsae.train(given, TOPK, config(), checkpoints=tmp_path / "whole", **options)
    same(finished, whole)
    assert finished.metrics == whole.metrics


def test_checkpoints_of_another_run_are_refused_by_the_setting(acts, tmp_path):
    interrupted(acts, tmp_path, 40, checkpoint_every=EVERY)
    with pytest.raises(ConfigError, match=r"run with train.seed=0, and this one has 1"):
        next(jsae.fit(acts, TOPK, config(seed=1), checkpoints=tmp_path))
    with pytest.raises(ConfigError, match=r"run with shuffle.seed=0, and this one has 5"):
        next(jsae.fit(acts, TOPK, config(), checkpoints=tmp_path, data_seed=5))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 40


def test_an_iterator_that_was_read_cannot_resume_a_run():
    source = StreamSource(iter([np.ones((10, 3), np.float32)] * 4))
    source.seek({"row": 25})
    with pytest.raises(ConfigError, match="an iterator of arrays cannot start again"):
        source.seek({"row": 5})


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED = {
    "a torch tensor": (torch.ones(4, D), r"converted to jax first: jsae.train\(bridge.to_jax\(acts\), …\)"),
    "torch tensors one after the other": (iter([torch.ones(4, D)]), r"\(bridge.to_jax\(x\) for x in loader\)"),
    "a list of torch tensors": ([torch.ones(4, D)], r"bridge.to_jax"),
    "a path": ("acts.npy", r"a memory map \(np.load\(path, mmap_mode='r'\)\).*, not str"),
    "a number": (3, "not int"),
    "nothing": ([], "at least one array"),
    "whole numbers": (np.ones((4, D), int), "floating-point numbers, not int64"),
    "sequences": (np.ones((4, 7, D), np.float32), r"shape \(4, 7, 32\): give acts.reshape\(-1, acts.shape\[-1\]\)"),
    "no rows": (np.ones((0, D), np.float32), r"not empty.*\(0, 32\)"),
    "unequal lengths": ([np.ones((4, D), np.float32), np.ones((5, D), np.float32)], r"but these have \[4, 5\]"),
    "lists of numbers": ([[1.0, 2.0]], "arrays of numpy or jax, .*, not list"),
    "another width": (np.ones((4, D + 1), np.float32), r"of widths \[32\], but these have \[33\]"),
    "two arrays for one": ([np.ones((4, D), np.float32)] * 2, r"of widths \[32\], but these have \[32, 32\]"),
    "an iterator of nothing": (iter([]), "ended after 0 rows"),
    "batches that are named": (iter([{"x": np.ones((4, D))}]), "not dict"),
    "widths that change": (
        iter([np.ones((4, D), np.float32), np.ones((4, 3), np.float32)]),
        r"widths \[32\], later ones \[3\]",
    ),
    "an iterator that ends": (iter([acts_of(300)]), "ended after 300 rows, and 20,000 are needed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_activations_is_refused_in_one_line(what):
    acts, complaint = REFUSED[what]
    with pytest.raises(ConfigError, match=complaint) as error:
        jsae.train(acts, TOPK, config())
    assert "\n" not in str(error.value)


def test_settings_that_cannot_be_are_refused_before_anything_is_read(acts):
    with pytest.raises(ConfigError, match="block_size=50 is less than one batch of 100"):
        jsae.fit(acts, TOPK, config(), block_size=50)
    with pytest.raises(ConfigError, match="report_every is 0"):
        jsae.fit(acts, TOPK, config(), report_every=0)
    with pytest.raises(ConfigError, match="relu has no k to lower"):
        jsae.fit(acts, jsae.ReLU.Config(D, 64), config(k_start=20))


def test_numbers_that_nothing_can_be_learned_from_are_refused(acts):
    with pytest.raises(jsae.DegenerateError, match="all zero"):
        jsae.train(np.zeros((500, D), np.float32), TOPK, config())
    broken = acts.copy()
    broken[7, 3] = np.nan
    with pytest.raises(jsae.ActivationsError, match="not finite"):
        jsae.train(broken, TOPK, config())
    with pytest.raises(jsae.ActivationsError, match="not finite"):
        jsae.train(acts.astype(np.float64) * 1e300, TOPK, config())


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [jsae, bridge], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_listed(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    assert set(package.__all__) == set(package._PLACES)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing_such'"):
        _ = package.nothing_such


def test_types_are_checked_with_the_same_names():
    import ast

    for package in (jsae, bridge):
        tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
        block = next(node for node in tree.body if isinstance(node, ast.If))
        seen = {}
        for line in block.body:
            for alias in line.names:
                module = f"{line.module}.{alias.name}" if line.module == "jsae" else f"{line.module}:{alias.name}"
                seen[alias.asname or alias.name] = module
        assert seen == package._PLACES


@pytest.mark.parametrize("package", ["jsae", "bridge"])
def test_the_bare_import_is_quick_and_loads_neither_jax_nor_torch(package):
    check = (
        f"import sys, time; before = time.perf_counter(); import {package}; dir({package});"
        "print(time.perf_counter() - before, *({'jax', 'torch', 'numpy', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert loaded == []
    assert float(seconds) < 0.5


def test_training_loads_no_torch():
    check = (
        "import sys, numpy as np, jsae\n"
        "acts = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)\n"
        "config = jsae.TrainConfig(num_activations=400, batch_size=100)\n"
        "jsae.train(acts, jsae.TopK.Config(8, 16, k=2), config, progress=True)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr.splitlines()[-1].startswith("training: 100 %, ")


def test_the_loaded_settings_are_json(trained):
    assert json.loads(json.dumps(trained.cfg)) == trained.cfg
