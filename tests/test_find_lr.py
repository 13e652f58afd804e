"""The search for a learning rate: what it finds, its edges, and what is refused."""

import dataclasses
import json
import math
import shutil

import numpy as np
import optax
import pytest
import python_text

import jsae
from bridge.training.config import RunConfig
from bridge.training.pipeline import train
from jsae import loop, rates, state
from jsae.config import TrainConfig
from jsae.health import ActivationsError, NotFiniteError
from jsae.rates import RateSweep, Trial
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F = 8, 24
RUN = TrainConfig(num_activations=64 * 400, batch_size=64)
TOPK = jsae.TopK.Config(D, F, k=3)


def acts(rows: int = 8192) -> np.ndarray:
    random = np.random.default_rng(0)
    parts = random.exponential(size=(rows, 20)) * (random.random((rows, 20)) < 0.15)
    return (3 * parts @ random.normal(size=(20, D)) + random.normal(size=D)).astype(np.float32)


def found(sae=TOPK, config: TrainConfig = RUN) -> RateSweep:
    sweeps: list[RateSweep] = []
    rate = jsae.find_lr(acts(), sae, config, report=sweeps.append)
    assert rate == sweeps[0].rate
    return sweeps[0]


def test_the_rate_that_is_found_trains_about_as_well_as_the_best_of_a_grid():
    """Of the same run at rates a factor 2 apart. An SAE this small ends in one optimum or another."""
    sweep = found()
    fvu = {
        rate: jsae.train(acts(), TOPK, dataclasses.replace(RUN, learning_rate=rate)).metrics["fvu"]
        for rate in (sweep.rate, *(sweep.rate * 2.0**octave for octave in (-3, -2, -1, 1, 2)))
    }
    assert fvu[sweep.rate] < 1.1 * min(fvu.values()), fvu
    assert max(fvu.values()) > 1.05 * fvu[sweep.rate], fvu


def test_a_trial_is_the_run_that_is_trained_alone_at_its_rate():
    sweep = found()
    assert sweep.num_steps == 150
    trial = sweep.trials[2]
    alone = jsae.train(acts(), TOPK, dataclasses.replace(rates.short_run(RUN), learning_rate=trial.rate))
    assert (trial.fvu, trial.l0) == pytest.approx((alone.metrics["fvu"], alone.metrics["l0"]), rel=1e-4)


def test_the_table_has_a_line_a_rate_and_what_follows(capsys):
    jsae.find_lr(acts(), TOPK, RUN, report=print)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rate", "FVU", "L0", "silent", "score"]
    shown = [float(line.split()[0]) for line in lines[1:-1]]
    assert shown == sorted(shown)
    assert 8 <= len(shown) <= 12
    assert lines[-1].startswith("best of 150 steps by FVU: ")


def test_penalised_saes_are_compared_by_loss_or_at_their_target():
    by_loss = found(jsae.ReLU.Config(D, F))
    assert by_loss.criterion == "loss"
    at_target = found(jsae.ReLU.Config(D, F, target_l0=3.0))
    assert at_target.criterion == "FVU * sqrt(L0 / target_l0)"
    near = [trial for trial in at_target.trials if 2.4 < trial.l0 < 3.8]
    for trial in near:
        assert trial.score == pytest.approx(trial.fvu * math.sqrt(trial.l0 / 3.0))
    assert min(at_target.trials, key=lambda trial: trial.score) in near


def test_an_sae_whose_latents_have_gone_silent_is_not_the_best():
    """As measured on the demo: FVU 1.018 at L0 0.9 was corrected to a score below that of FVU 0.78 at L0 16.6."""
    target = loop.Member(jsae.ReLU.Config(D, F, target_l0=16.0), RUN)
    silent, missed, good = (
        rates._trial(target, 1e-3, {"fvu": fvu, "l0": l0, "loss": 1.0, "dead_fraction": 0.0}).score
        for fvu, l0 in ((1.018, 0.45), (0.4, 40.0), (0.785, 15.0))
    )
    assert silent > 10
    assert good < missed < silent


def trials(*scores: float) -> list[Trial]:
    return [Trial(1e-3 * 2.0**i, score, 3.0, 0.0, score) for i, score in enumerate(scores)]


def member(steps: int = 150) -> loop.Member:
    return loop.Member(TOPK, TrainConfig(64 * steps, 64))


def test_a_best_rate_at_an_end_of_the_grid_asks_for_rates_beyond_it():
    assert rates._beyond(trials(1.0, 2.0, 3.0)) == [0.5e-3, 0.25e-3]
    assert rates._beyond(trials(3.0, 2.0, 1.0)) == pytest.approx([8e-3, 16e-3])
    assert rates._beyond(trials(3.0, 1.0, 2.0)) == []


def test_the_parabola_finds_a_minimum_between_rates():
    at = 0.3  # the lowest rate with a score of 1.01 lies sqrt(log(1.01)) octaves below
    curve = [Trial(1e-3 * 2.0**o, 1.0, 3.0, 0.0, math.exp((o - at) ** 2)) for o in (-2, -1, -0.5, 0, 0.5, 1, 2)]
    sweep = rates._result(member(), curve, 1.0, 1.0)
    assert sweep.best == pytest.approx(1e-3 * 2.0 ** (at - math.sqrt(math.log(1.01))), rel=0.01)
    assert sweep.rate == sweep.best  # the short run is as long as the run


def test_a_longer_run_gets_a_lower_rate():
    curve = trials(2.0, 1.0, 2.0)
    short, long = (rates._result(member(steps), curve, fall, 1.0) for steps, fall in ((150, 1.0), (1500, 0.5)))
    assert short.best == long.best
    assert long.rate == pytest.approx(long.best / 2, rel=0.01)


def test_no_rate_below_those_that_were_tried_is_recommended():
    """Scores still fall slowly towards the lowest rate: a parabola's lowest point lies beyond it."""
    slow = [
        Trial(1e-3 * 2.0**octave, 1.0, 3.0, 0.0, math.exp(0.01 * octave**2 + 0.001 * octave)) for octave in range(4)
    ]
    assert rates._result(member(), slow, 1.0, 1.0).best == pytest.approx(1e-3)


@pytest.mark.parametrize("tails", [0.0, 1.5])
def test_the_rate_falls_with_the_length_as_the_default_does(tails):
    """With the root of the steps; more slowly beyond 2^18 activations where few tokens have most of the variance."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((4096, 64))
    rows *= np.exp(tails * random.standard_normal((4096, 1))) / np.linalg.norm(rows, axis=1, keepdims=True)
    sae, train = jsae.Gated.Config(64, 256, target_l0=3.0), TrainConfig(2**22, 1024)
    member, sample = loop.Member(sae, train), rows.astype(np.float32)
    statistics = state.rate_statistics(sae, sample)
    defaults = [
        float(first.rate)
        for config in (rates.short_run(train), train)
        for first in loop.init([member._replace(train=config)], (sample,))
    ]
    assert rates._default(member, statistics) == pytest.approx(defaults[0])
    fall = rates._fall(member, statistics.heaviness)
    assert fall == pytest.approx(defaults[1] / defaults[0])
    root = math.sqrt(rates.short_steps(train) / train.num_steps)
    assert fall == pytest.approx(root, rel=0.01) if not tails else 1.5 * root < fall < 1


def test_activations_that_are_not_finite_are_refused_before_a_run():
    sample = acts()
    sample[3] = np.nan

    def open_stream(steps):
        return iter(()), (sample,)

    with pytest.raises(ActivationsError, match="8 numbers of the 8192 activations are not finite"):
        rates.sweep([loop.Member(TOPK, RUN)], open_stream)


def test_rates_that_diverge_are_never_the_best():
    sweep = rates._result(member(), trials(2.0, 1.0, math.inf, math.inf), 1.0, 1.0)
    assert sweep.best < 4e-3
    with pytest.raises(NotFiniteError, match=r"no learning rate from 0.001 to 0.002 trains with a finite loss"):
        rates._result(member(), trials(math.inf, math.inf), 1.0, 1.0)
    assert json.loads(json.dumps(sweep.to_json()))["trials"][2]["score"] is None


def test_short_runs_are_a_share_of_the_run_within_limits():
    assert [rates.short_steps(TrainConfig(64 * steps, 64)) for steps in (20, 1000, 8000, 10**6)] == [20, 150, 400, 1000]
    short = rates.short_run(TrainConfig(64 * 8000, 64, dead_after=64 * 2000, resample_every=6400))
    assert (short.num_steps, short.dead_after, short.resample_every) == (400, 64 * 100, None)


def test_several_saes_get_a_rate_each_in_one_pass():
    members = [loop.Member(TOPK, RUN), loop.Member(jsae.TopK.Config(D, F, k=1), RUN)]
    opened = []

    def open_stream(steps):
        opened.append(steps)
        data = acts()
        return ((data[64 * i % 8192 :][:64],) for i in range(steps)), (data,)

    both = rates.sweep(members, open_stream)
    assert len(both) == 2
    assert len(opened) <= 4
    (alone,) = rates.sweep(members[1:], open_stream)
    assert [t.rate for t in alone.trials] == [t.rate for t in both[1].trials]
    np.testing.assert_allclose([t.fvu for t in alone.trials], [t.fvu for t in both[1].trials], rtol=1e-4)


def test_what_has_no_rate_to_find_is_refused():
    with pytest.raises(ConfigError, match=r"learning_rate=0.001 is given: leave it out"):
        jsae.find_lr(acts(), TOPK, dataclasses.replace(RUN, learning_rate=1e-3))
    with pytest.raises(ConfigError, match="an iterator can be read once"):
        jsae.find_lr(iter([acts()]), TOPK, RUN)
    with pytest.raises(ConfigError, match="widths"):
        jsae.find_lr(acts()[:, :4], TOPK, RUN)
    with pytest.raises(ConfigError, match="an optimiser of your own"):
        rates.sweep([loop.Member(TOPK, RUN, inner=optax.sgd(1e-3))], lambda steps: None)
    with pytest.raises(ConfigError, match=r"--find_lr chooses .* and --learning_rate=0.001,0.002 gives"):
        RunConfig(find_lr=True, learning_rate=(1e-3, 2e-3))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return python_text.copied(tmp_path_factory.mktemp("text"), 20)


def test_a_command_trains_each_sae_at_its_rate_and_records_it(text, tmp_path, capsys):
    flags = {"num_activations": 4000, "batch_size": 250, "block_size": 1000, "context_size": 64, "expansion_factor": 1}
    flags |= {"checkpoint_every": 1000, "log_every": 4, "heldout_tokens": 1000, "k": (4, 8), "data": text}
    config = RunConfig(output_dir=str(tmp_path / "run"), find_lr=True, **flags)
    run = train(config)
    out = capsys.readouterr().out
    facts = run.facts["find_lr"]
    assert set(facts) == {f"k{k} blocks.2.hook_resid_post" for k in (4, 8)}
    for k, (label, sweep) in zip((4, 8), facts.items(), strict=True):
        assert f"{label}\n" in out
        assert f"learning rate of the run: {sweep['rate']:.3g}; took" in out
        lines = [json.loads(line) for line in (tmp_path / "run" / f"k{k}" / "metrics.jsonl").read_text().splitlines()]
        assert max(line["learning_rate"] for line in lines) == pytest.approx(sweep["rate"], rel=1e-4)
    alone = flags | {"k": (8,), "learning_rate": (facts["k8 blocks.2.hook_resid_post"]["rate"],)}
    own = train(RunConfig(output_dir=str(tmp_path / "own"), **alone))
    name = "sae/blocks.2.hook_resid_post/sae_weights.safetensors"
    expected = (own.path / name).read_bytes()
    assert (run.path / "k8" / name).read_bytes() == expected
    shutil.rmtree(run.path / "checkpoints" / "16")
    train(dataclasses.replace(config, resume=True))
    assert "finding the learning rate" not in capsys.readouterr().out
    assert (run.path / "k8" / name).read_bytes() == expected
