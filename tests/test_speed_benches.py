"""The measurements of speed: each runs from flags to files on real steps; the other trainers have a stand-in."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.training import device
from experiments.bench import BENCHES
from experiments.benches import (
    contest,
    finetune,
    gpu,
    gpu_determinism,
    gpu_peers,
    gpu_steps,
    memory,
    peers,
    resident,
    shapes,
    step,
    store,
    stream,
    sweep,
)
from experiments.benches.shapes import Size
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")
TINY = "16:64:4:32"
ROOT = Path(__file__).resolve().parents[1]
NO_GPU = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | {"CUDA_VISIBLE_DEVICES": ""}

PEER = """
import json, os, sys
from pathlib import Path
import numpy as np

print(json.dumps({"versions": {"stand-in": "1"}}), flush=True)
rows = np.load(Path(sys.argv[1]) / "x.npy").shape[1]
assert os.environ["OMP_WAIT_POLICY"] == "passive"
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "make":
        assert job["batch"] == rows and job["nested_widths"][-1] < job["d_sae"]
        seconds = {"step": 100.0 if job["trainer"] == "SAELens" else 200.0, "matmul": 3.0 if job["matmul"] else None}
        answer = {}
    elif job["do"] == "peak":
        answer = {"before": 1000, "peak": 1000 + 4 * 64 * 32 * job["steps"]}
    else:
        answer = {"seconds": seconds[job["do"]]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replace all other trainers by a script that reports fixed times."""
    script = tmp_path / "stand_in.py"
    script.write_text(PEER)
    monkeypatch.setattr(contest, "SCRIPT", script)
    monkeypatch.setattr(peers, "trainers", lambda folder: sys.executable)


@pytest.fixture
def their_side(monkeypatch):
    """Import the script of the other trainers, which imports modules from its own folder."""
    monkeypatch.syspath_prepend(Path(contest.__file__).parent)
    from experiments.benches import contest_peer

    return contest_peer


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Restore threads and environment, which measurements set for the whole process."""
    for name in ("JAX_PLATFORMS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}[name])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_steps_and_their_parts_are_measured_over_the_encoder(tmp_path, capsys):
    config = step.Config(
        sizes=(TINY, "16:128:4:32"),
        architectures=("topk", "relu"),
        warmup_steps=1,
        rounds=2,
        trace_dir=str(tmp_path / "trace"),
        markdown=True,
        out=f"{tmp_path}/step_{{device}}.json",
    )
    assert step.main(config) == 0
    told = _read(tmp_path / "step_cpu.json")
    assert told["machine"]["jax"]
    assert [Size(**found["size"]).d_sae for found in told["results"]] == [64, 128]
    for found in told["results"]:
        assert set(found["seconds"]) == {step.MATMUL, "topk", "relu", *step.PARTS}
        assert all(0 < s["q1"] <= s["median"] <= s["q3"] for s in found["seconds"].values())
        assert found["over_matmul"][step.MATMUL]["median"] == 1
        assert found["over_topk"]["topk"]["median"] == 1
        assert found["activations_per_second"]["relu"] == pytest.approx(32 / found["seconds"]["relu"]["median"])
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    shown = capsys.readouterr().out
    assert f"| relu | {1e3 * told['results'][0]['seconds']['relu']['median']:.1f} |" in shown
    assert f"jax {told['machine']['jax']}" in shown


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "batchtopk", "matryoshka"])
def test_latents_that_shall_be_dead_stay_so_while_it_is_measured(architecture):
    size = Size.parse("16:64:4:32")
    x = shapes.activations(size)
    member = shapes.member(architecture, size)
    (state,) = states = shapes.begin(member, x, dead=0.25)
    faint = np.array(state.sae.W_enc[...])[:16]
    program = shapes.program(member)
    for _ in range(3):
        states, _ = program(states, (x,))
    (state,) = states
    is_dead = np.asarray(state.since_fired) >= member.train.dead_after
    np.testing.assert_array_equal(is_dead, np.arange(64) < 16)
    assert (np.asarray(state.sae.W_enc[...])[:16] != faint).any()  # AuxK reaches them


def test_no_latent_dies_where_none_shall():
    size = Size.parse(TINY)
    (state,) = shapes.begin(shapes.member("topk", size), shapes.activations(size))
    assert not (np.asarray(state.since_fired) > 0).any()


def test_trainers_are_compared_round_by_round(stand_in, tmp_path, capsys):
    config = contest.Config(
        sizes=(TINY, "16:128:4:32"),
        architectures=("topk", "gated"),
        later_architectures=("topk",),
        trainers=("SAELens", "sparsify"),
        warmup_steps=0,
        rounds=2,
        markdown=True,
        out=f"{tmp_path}/peers_{{device}}.json",
    )
    assert contest.main(config) == 0
    told = _read(tmp_path / "peers_cpu.json")
    assert told["machine"]["stand-in"] == "1"
    rows = {(row["architecture"], row["size"]["d_sae"]): row for row in told["results"]}
    assert set(rows) == {("topk", 64), ("gated", 64), ("topk", 128)}
    assert set(rows["gated", 64]["times_faster"]) == {"SAELens"}  # sparsify has none
    topk = rows["topk", 64]
    assert topk["seconds"]["sparsify"]["median"] == 200
    assert topk["seconds"][contest.THEIR_MATMUL]["median"] == 3
    faster = topk["times_faster"]
    assert faster["sparsify"]["median"] == pytest.approx(2 * faster["SAELens"]["median"])
    assert 100 / topk["seconds"][contest.OURS]["q3"] <= faster["SAELens"]["median"] * 1.001
    assert topk["activations_per_second"]["SAELens"] == pytest.approx(0.32)
    assert "| SAELens | 100000.0 |" in capsys.readouterr().out


def test_saelens_takes_its_own_steps(tmp_path):
    size = Size.parse("16:64:4:128")
    settings = {"threads": 1, "autocast": False, "warmup_steps": 0}
    with contest.sides(sys.executable, ["SAELens"], size, "matryoshka", "cpu", settings) as (versions, asks):
        assert versions["sae-lens"].startswith("6.")
        ask = asks["SAELens"]
        assert ask({"do": "step"})["seconds"] > 0
        assert ask({"do": "matmul"})["seconds"] > 0
        told = ask({"do": "peak", "steps": 1})
        assert told["peak"] >= told["before"] > 2**20


def test_a_loop_is_led_one_batch_at_a_time(their_side):
    turns, seen = their_side._Turns(), []

    def loop():
        for _ in range(2):
            seen.append(turns.next_batch())
        raise ValueError("no more")

    follow = turns.follow(loop)
    assert seen == []
    follow("first")
    assert seen == ["first"]
    with pytest.raises(ValueError, match="no more"):
        follow("second")
    assert seen == ["first", "second"]


def test_every_trainer_of_the_contest_has_a_side(their_side):
    assert set(their_side.LIBRARIES) == set(contest.TRAINERS)


def test_the_peak_forgets_what_was_before():
    del [np.ones(2**24)][0]  # 128 MB that are given back
    before = resident.forget_peak()
    held = np.ones(2**22)  # 32 MB
    most = resident.peak()
    assert held.nbytes * 0.9 < most - before < 2**26


def test_memory_is_planned_and_needed_beyond_what_stays(stand_in, tmp_path, capsys):
    config = memory.Config(
        sizes=("32:2048:4:512",),
        architectures=("topk",),
        trainers=("SAELens",),
        steps=2,
        markdown=True,
        out=f"{tmp_path}/memory_{{device}}.json",
    )
    assert memory.main(config) == 0
    ours, theirs = _read(tmp_path / "memory_cpu.json")["results"]
    array = 4 * 2048 * 512
    assert ours["trainer"] == contest.OURS
    assert ours["bytes"]["planned"] == pytest.approx(ours["arrays"]["planned"] * array)
    assert ours["arrays"]["planned"] > 0.5
    assert 0.2 < ours["arrays"]["needed"] < 50
    assert ours["bytes"]["before"] > 2**25
    assert theirs["bytes"] == {"needed": 2 * 4 * 64 * 32, "before": 1000}
    assert f"| {ours['arrays']['needed']:.2f} |" in capsys.readouterr().out


def test_a_stream_is_measured_against_the_bare_forward(tmp_path, capsys):
    config = stream.Config(
        models=("demo", "d2"),
        batch_size=256,
        block_size=512,
        expansion_factor=2,
        vocab_size=4096,
        rounds=2,
        threads=1,
        markdown=True,
        out=f"{tmp_path}/stream_{{device}}.json",
    )
    assert stream.main(config) == 0
    demo, deeper = _read(tmp_path / "stream_cpu.json")["results"]
    assert (demo["model"], demo["hook"], deeper["hook"]) == (
        "demo",
        "blocks.3.hook_resid_post",
        "blocks.1.hook_resid_post",
    )
    assert (deeper["d_in"], deeper["d_sae"]) == (128, 256)
    for found in (demo, deeper):
        assert set(found["seconds_per_block"]) == {stream.FORWARD, stream.ITS_FORWARD, stream.STEPS, stream.STREAM}
        assert all(s["median"] > 0 for s in found["seconds_per_block"].values())
        assert found["activations_per_second"][stream.STREAM] == pytest.approx(
            512 / found["seconds_per_block"][stream.STREAM]["median"]
        )
        assert found["stream_over_forward"]["median"] > 0
        assert found["hidden"]["median"] <= 1.5
    assert f"| {demo['stream_over_forward']['median']:.2f} (" in capsys.readouterr().out


def test_many_saes_in_one_pass_are_measured_against_runs_and_against_other_ways_of_stepping(tmp_path):
    sizes = {"batch_size": 128, "block_size": 256, "expansion_factor": 2, "k": 4}
    assert sweep.main(sweep.Config(counts=(2,), rounds=2, out=f"{tmp_path}/sweep.json", **sizes)) == 0
    (found,) = _read(tmp_path / "sweep.json")["results"]
    assert found["count"] == 2
    assert found["one_pass_over_runs"]["median"] > 0
    assert set(found["step_over_one_program"]) == {sweep.STACKED, sweep.MAPPED}


def test_a_store_is_measured_in_all_its_parts(tmp_path):
    sizes = {"rows": 2**16, "width": 4, "tokens": 2**14, "num_activations": 2**13, "d_sae": 64, "seeds": 1}
    config = store.Config(**sizes, sizes=(TINY,), rounds=2, batch_size=512, k=4, out=str(tmp_path / "store.json"))
    assert store.main(config) == 0
    results = json.loads((tmp_path / "store.json").read_text())["results"]
    assert set(results) == {"throughput", "types", "shuffle", "speed"}
    disk = {name: results["throughput"][name]["disk_bytes_per_row"] for name in ("float32", "bfloat16", "int8")}
    assert disk["int8"] < disk["bfloat16"] < disk["float32"]
    errors = {name: values["error_over_variance"] for name, values in results["types"].items()}
    assert errors["float32"] == 0 < errors["bfloat16"] < errors["int8"] < 1e-3
    assert results["shuffle"]["text"]["documents"] < results["shuffle"]["perfect"]["documents"]
    assert results["speed"][0]["speed_over_memory"]["store"]["median"] > 0


def test_a_stream_of_text_that_the_model_has_no_tokens_for_is_refused():
    with pytest.raises(ValueError, match="vocab_size=100"):
        stream.main(stream.Config(models=("d2",), vocab_size=100, batch_size=64, block_size=64))


def test_the_suite_for_a_gpu_is_the_goals_sizes_and_writes_a_file_each(tmp_path):
    suite = gpu.suite(gpu.Config(folder=str(tmp_path), peer_wheels="wheels"))
    assert list(suite) == list(gpu.MEASUREMENTS)
    told = {name: " ".join(part.command) for name, part in suite.items()}
    for name in suite:
        assert f"--out={tmp_path}/{name}_cuda.json" in told[name]
        assert "--device=cuda" in told[name]
    for name in ("step", "peers", "memory", "determinism"):
        assert "1280:20480:64:16384" in told[name], name
    assert "--wide=1280:131072:64:16384" in told["step"]
    assert "--peer_wheels=wheels" in told["peers"]
    assert "--models=d20" in told["stream"]
    assert list(gpu.suite(gpu.Config(measurements=("stream", "step")))) == ["stream", "step"]


@pytest.mark.parametrize("name", gpu.MEASUREMENTS)
def test_the_parts_of_the_suite_take_the_flags_that_they_are_given(name):
    """Their flags are read, and then the missing GPU is reported."""
    part = gpu.suite(gpu.Config())[name]
    done = subprocess.run(
        [sys.executable, *part.command], cwd=ROOT, env=NO_GPU, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode in (1, 2)
    assert "no GPU" in done.stderr + done.stdout, done.stderr
    assert "Unknown command line flag" not in done.stderr


def test_a_part_that_fails_or_is_late_does_not_stop_the_others(tmp_path, capfd):
    def python(code: str, seconds: int = 60) -> gpu.Part:
        return gpu.Part(("-c", code), seconds)

    sleeper = tmp_path / "sleeper"
    late = "import subprocess; p = subprocess.Popen(['sleep', '60']); "
    late += f"open({str(sleeper)!r}, 'w').write(str(p.pid)); p.wait()"
    parts = {"wrong": python("raise SystemExit(3)"), "late": python(late, 2), "right": python("print('it ran')")}
    assert gpu.follow(parts, 60) == 1
    told = capfd.readouterr()
    assert "it ran" in told.out
    assert "FAILED wrong: exit code 3" in told.err
    assert "FAILED late: not done after 2 s" in told.err
    assert "FAILED right" not in told.err
    state = Path(f"/proc/{sleeper.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_what_has_not_begun_when_the_time_is_over_is_left_out(capfd):
    nothing = gpu.Part(("-c", "print('it ran')"), 60)
    assert gpu.follow({"one": nothing}, 10) == 1
    told = capfd.readouterr()
    assert "left out" in told.err
    assert "it ran" not in told.out
    assert gpu.follow({"one": nothing}, 100) == 0


def test_whole_steps_are_timed_evenly_and_skewed(tmp_path):
    size = "16:256:4:512"
    few = {"architectures": ("topk", "relu"), "wide": "", "rounds": 2, "steps": 2, "warmup_steps": 1}
    config = gpu_steps.Config(size=size, device="cpu", matmul_dtype="float32", out=f"{tmp_path}/step.json", **few)
    assert gpu_steps.main(config) == 0
    told = _read(tmp_path / "step.json")
    assert told["failed"] == {}
    found = {(row["architecture"], row["firing"]): row for row in told["results"]}
    assert set(found) == {("topk", "even"), ("relu", "even"), ("topk", "skewed")}
    for row in found.values():
        assert row["activations_per_second"] == pytest.approx(512 / row["seconds"]["median"])
        assert row["operations"] == "cpu"
    assert found["topk", "skewed"]["most_frequent"] > 2 * found["topk", "even"]["most_frequent"]


def test_shares_of_uneven_latents_add_up_to_k_and_reach_a_third():
    shares = gpu_steps.shares_of(20480, 64)
    assert sum(shares) == pytest.approx(64, rel=1e-4)
    assert max(shares) == pytest.approx(1 / 3)
    assert min(shares) > 0


def test_the_cost_of_determinism_is_measured_and_its_promise_checked(tmp_path):
    small = {"size": "16:64:4:32", "depth": 2, "rows": 1, "steps": 8, "matmul_dtype": "float32", "device": "cpu"}
    names = (gpu_determinism.DEFAULT, gpu_determinism.DETERMINISTIC)
    config = gpu_determinism.Config(**small, settings=names, architectures=("topk",), out=f"{tmp_path}/d.json")
    assert gpu_determinism.main(config) == 0
    told = _read(tmp_path / "d.json")
    assert told["failed"] == {}
    for name in names:
        assert told["results"][name]["identical"] is True
        assert set(told["results"][name]["cost"]) == {"topk", "forward"}
        assert len(told["results"][name]["first"]["digests"]["topk"]) == 64
    assert told["results"]["default"]["cost"] == {"topk": 0, "forward": 0}


def test_trainers_of_a_gpu_alternate_and_one_that_fails_is_named(stand_in, tmp_path, monkeypatch):
    refusing = PEER.replace("answer = {}", "answer = {} if job['trainer'] != 'sparsify' else sys.exit('no card')")
    script = tmp_path / "refusing.py"
    script.write_text(refusing)
    monkeypatch.setattr(contest, "SCRIPT", script)
    config = gpu_peers.Config(
        size=TINY,
        architectures=("topk", "relu"),
        device="cpu",
        rounds=2,
        warmup_steps=0,
        matmul_dtype="float32",
        out=f"{tmp_path}/peers.json",
    )
    assert gpu_peers.main(config) == 1
    told = _read(tmp_path / "peers.json")
    assert list(told["failed"]) == ["sparsify"]
    assert "no card" in told["failed"]["sparsify"]
    topk, relu = told["results"]
    assert set(topk["times_faster"]) == set(relu["times_faster"]) == {"SAELens", "dictionary_learning"}
    assert topk["seconds"]["SAELens"]["median"] == 100
    assert topk["peak_bytes"]["SAELens"] == 1000 + 2 * 4 * 64 * 32


def test_wheels_are_unpacked_beside_stand_ins_for_what_a_step_does_not_use(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no wheels"):
        peers.from_wheels(str(wheels), site)
    with zipfile.ZipFile(wheels / "trainer-1-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "trainer.py",
            "import nnsight.tracing\nfrom umap import UMAP\nfrom circuitsvis.graph_objects import Figure\n"
            "class Own(Figure): pass\n@nnsight.tracing.traced(deep=True)\ndef step(): return 1\n"
            "settings = nnsight.settings.of(3)\n",
        )
    variables = peers.from_wheels(str(wheels), site)
    code = "import trainer, json; trainer.Own(1); print(trainer.UMAP.__name__, json.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["UMAP", "json"], done.stderr
    missing = subprocess.run(
        [sys.executable, "-c", "import not_there"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ModuleNotFoundError" in missing.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_and_each_measurement_say_so():
    with pytest.raises(ValueError, match="torch sees no GPU"):
        gpu.main(gpu.Config())
    with pytest.raises(ConfigError, match="jax has no GPU"):
        step.main(step.Config(device="cuda"))
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        device.share("cuda:1", 0.4)


def test_jax_is_kept_to_the_processor_where_it_is_imported_already(monkeypatch):
    """Flags that name an architecture import it, before the device is shared."""
    monkeypatch.delenv("JAX_PLATFORMS")
    code = (
        "import jax\n"
        "from bridge.training import device\n"
        "device.share('cpu', 0.4)\n"
        "assert jax.config.jax_platforms == 'cpu'\n"
        "assert jax.devices()[0].platform == 'cpu'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(step.__file__).parents[2])


def test_every_measurement_shows_its_flags_without_torch_and_jax():
    code = (
        "import sys, importlib\n"
        f"for module in {list(BENCHES.values())!r}: importlib.import_module(module)\n"
        "assert not {'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(step.__file__).parents[2])


@pytest.mark.parametrize(
    ("bench", "wrong"),
    [
        (step, {"sizes": ("768:6144",)}),
        (step, {"sizes": ()}),
        (step, {"sizes": ("8:16:17:4",)}),
        (step, {"architectures": ("me",)}),
        (step, {"rounds": 1}),
        (step, {"dead": 1.0}),
        (step, {"ops": "fast"}),
        (step, {"warmup_steps": -1}),
        (contest, {"trainers": ("me",)}),
        (contest, {"later_architectures": ("abstopk",)}),
        (contest, {"architectures": ("abstopk",)}),
        (contest, {"autocast": True}),
        (contest, {"rounds": 1}),
        (finetune, {"architectures": ("me",)}),
        (finetune, {"objectives": ("l2",)}),
        (finetune, {"tuning_activations": 100}),
        (memory, {"steps": 0}),
        (memory, {"trainers": ("me",)}),
        (stream, {"models": ("gpt2",)}),
        (stream, {"block_size": 3000}),
        (stream, {"device": "tpu"}),
        (stream, {"k": 0}),
        (stream, {"rounds": 1}),
        (stream, {"jax_memory_fraction": 1.0}),
        (gpu, {"measurements": ("speed",)}),
        (gpu, {"models": ("d1",)}),
        (gpu, {"size": "0:1:1:1"}),
        (gpu, {"minutes": 0}),
        (gpu_steps, {"size": "8:16:17:4"}),
        (gpu_steps, {"rounds": 1}),
        (gpu_peers, {"trainers": ("me",)}),
        (gpu_peers, {"rounds": 1}),
        (gpu_determinism, {"settings": ("fast",)}),
        (gpu_determinism, {"steps": 2}),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bench.Config(**wrong)
