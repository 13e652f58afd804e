"""Metrics of an exported SAE against values worked out by hand, on a model of a dozen weights."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_nanochat import tiny
from torch import nn
from toy_saes import FORMS, export, toy_sae

from bridge.evaluate import Site, core, latents, measure, reconstruction, splice, survey
from bridge.hooks import capture, edit
from bridge.torch_sae import TorchSAE

A, B, BOS, SINK = range(4)
BYTES = np.array([1, 2, 0, 0], np.int32)
HOOK = "blocks.0.hook_resid_post"


class ByHand(nn.Module):
    """At the hook a is (2, 0), b (0, 2), BOS (2, 2), the sink (200, 0). Logits: (ln 2 x0, ln 3 x1, 0, nearly -inf)."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding.from_pretrained(torch.tensor([[1.0, 0], [0, 1], [1, 1], [100, 0]]))
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2, bias=False)])})
        self.head = nn.Linear(2, 4)
        with torch.no_grad():
            self.transformer.h[0].weight.copy_(2 * torch.eye(2))
            self.head.weight.copy_(torch.tensor([[math.log(2), 0], [0, math.log(3)], [0, 0], [0, 0]]))
            self.head.bias.copy_(torch.tensor([0, 0, 0, -1e30]))
        self.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.transformer.h[0](self.wte(tokens)))


def sae_of(b_enc: list[float], W_dec=((1.0, 0), (0, 1))) -> TorchSAE:
    """relu(x + b_enc), read and written along the axes."""
    weights = {
        "W_enc": torch.eye(2),
        "W_dec": torch.tensor(W_dec),
        "b_dec": torch.zeros(2),
        "b_enc": torch.tensor(b_enc),
    }
    return TorchSAE({"architecture": "standard", "d_in": 2, "d_sae": 2}, weights)


ROWS = np.array([[BOS, A, B, A]])
SHRINKING = sae_of([-1.0, 0.0])  # a becomes (1, 0), b stays (0, 2)


def kl(p, q):
    p, q = np.array(p) / sum(p), np.array(q) / sum(q)
    return float((p * np.log(p / q)).sum())


@pytest.fixture(scope="module")
def measured():
    summary, columns = measure(Site(ByHand(), HOOK, (BOS,)), SHRINKING, ROWS, BYTES)
    return summary, columns


# Probabilities of (a, b, BOS) go as (2^x0, 3^x1, 1). Predictions that count: b after a, and a after b.
MEAN = (2 ** (4 / 3), 3 ** (2 / 3), 1)  # the mean of (2, 0), (0, 2), (2, 0) is (4/3, 2/3)
CE = (math.log(6) + math.log(11)) / 2
CE_SAE = (math.log(4) + math.log(11)) / 2
CE_ZERO = math.log(3)
CE_MEAN = math.log(sum(MEAN)) - (math.log(MEAN[0]) + math.log(MEAN[1])) / 2
KL_SAE = 2 * kl((4, 1, 1), (2, 1, 1)) / 3
KL_ZERO = (2 * kl((4, 1, 1), (1, 1, 1)) + kl((1, 9, 1), (1, 1, 1))) / 3
KL_MEAN = (2 * kl((4, 1, 1), MEAN) + kl((1, 9, 1), MEAN)) / 3


def test_the_model_with_the_sae_or_an_ablation_predicts_as_worked_out_by_hand(measured):
    summary, _ = measured
    assert summary["model_performance_preservation"] == pytest.approx(
        {
            "ce_loss_without_sae": CE,
            "ce_loss_with_sae": CE_SAE,
            "ce_loss_with_ablation": CE_ZERO,
            "ce_loss_with_mean_ablation": CE_MEAN,
            "ce_loss_score": (CE_ZERO - CE_SAE) / (CE_ZERO - CE),
            "ce_loss_score_mean_ablation": (CE_MEAN - CE_SAE) / (CE_MEAN - CE),
        },
        rel=1e-6,
    )
    assert summary["model_behavior_preservation"] == pytest.approx(
        {
            "kl_div_with_sae": KL_SAE,
            "kl_div_with_ablation": KL_ZERO,
            "kl_div_with_mean_ablation": KL_MEAN,
            "kl_div_score": (KL_ZERO - KL_SAE) / KL_ZERO,
            "kl_div_score_mean_ablation": (KL_MEAN - KL_SAE) / KL_MEAN,
        },
        rel=1e-6,
    )


def test_bits_per_byte_counts_every_target_that_is_text_also_after_bos(measured):
    after_bos = math.log(14 / 4)  # BOS keeps its (2, 2) under every variant: probabilities go as (4, 9, 1)
    bits = {"without_sae": CE, "with_sae": CE_SAE, "with_ablation": CE_ZERO, "with_mean_ablation": CE_MEAN}
    expected = {name: (after_bos + 2 * loss) / (math.log(2) * (1 + 2 + 1)) for name, loss in bits.items()}
    assert measured[0]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_the_reconstruction_is_measured_as_worked_out_by_hand(measured):
    # x: (2, 0), (0, 2), (2, 0); e: 1, 0, 1 in the first; |x|^2 is 4, |E x|^2 is 20/9, the variance 16/9.
    summary, _ = measured
    assert summary["reconstruction_quality"] == pytest.approx(
        # distances from the batch's mean: 8/9, 32/9, 8/9, so the old measure is (1 - 9/8 + 1 + 1 - 9/8) / 3
        {"explained_variance": 1 - (2 / 3) / (16 / 9), "explained_variance_legacy": 0.25, "mse": 2 / 3, "cossim": 1.0}
    )
    assert summary["shrinkage"] == pytest.approx(
        {"l2_norm_in": 2.0, "l2_norm_out": 4 / 3, "l2_ratio": 2 / 3, "relative_reconstruction_bias": 6 / 8}
    )
    assert summary["sparsity"] == pytest.approx({"l0": 1.0, "l1": 4 / 3})
    assert summary["token_stats"] == {
        "total_tokens_eval_reconstruction": 4,
        "total_tokens_eval_sparsity_variance": 3,
    }


def test_latents_are_described_as_worked_out_by_hand(measured):
    summary, columns = measured
    expected = {
        "feature_density": [2 / 3, 1 / 3],
        "consistent_activation_heuristic": [2.0, 1.0],
        "encoder_bias": [-1.0, 0.0],
        "encoder_norm": [1.0, 1.0],
        "encoder_decoder_cosine_sim": [1.0, 1.0],
        "max_encoder_cosine_sim": [0.0, 0.0],
        "max_decoder_cosine_sim": [0.0, 0.0],
    }
    assert columns.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, atol=1e-7, err_msg=name)
    assert summary["misc_metrics"] == pytest.approx(
        {
            "freq_over_1_percent": 1.0,
            "freq_over_10_percent": 1.0,
            "normalized_freq_over_1_percent": 1.0,
            "normalized_freq_over_10_percent": 1.0,
            "average_max_encoder_cosine_sim": 0.0,
            "average_max_decoder_cosine_sim": 0.0,
            "frac_alive": 1.0,
        }
    )


def test_the_plain_metrics_stay_beside_the_groups(measured):
    assert {"tokens", "fvu", "explained_variance", "mse", "l0", "cosine", "dead_fraction"} <= measured[0].keys()
    assert measured[0]["fvu"] == pytest.approx(3 / 8)


def test_sinks_keep_their_activation_in_every_variant_and_enter_the_means_of_the_model_only():
    rows = np.array([[BOS, SINK, A, A, B, A]])
    site = Site(ByHand(), HOOK, (BOS,))
    silent = sae_of([-1000.0, -1000.0])  # its reconstruction is zero, so that SAE and zero ablation are one
    mean = np.zeros(2, np.float32)
    found = splice.effects(site, silent, [rows], mean, BYTES)
    assert found["with_sae"] == found["with_ablation"] == found["with_mean_ablation"]
    # After the sink, (200, 0), a is certain under every variant; after a, a and b all is alike.
    assert found["with_sae"].cross_entropy == pytest.approx(3 * math.log(3) / 4)
    replaced = splice.effects(Site(ByHand(), HOOK, (BOS,), drop_sinks=False), silent, [rows], mean, BYTES)
    assert replaced["with_sae"].cross_entropy == pytest.approx(math.log(3))
    assert survey.survey(site, SHRINKING, [rows]).sums.tokens == 4


@pytest.mark.parametrize("most", [2**21, 300])
def test_effects_are_those_of_whole_passes(monkeypatch, most):
    """With few logits at once, every row is a pass of its own, and its positions are compared one by one."""
    monkeypatch.setattr(splice, "most_numbers", lambda device: most)
    model, name = tiny("G7"), "blocks.2.hook_mlp_out"
    rows = np.random.default_rng(0).integers(1, 50, (3, 12))
    sae, mean = toy_sae("topk", 32, 64, k=5), np.full(32, 0.1, np.float32)
    site = Site(model, name, (), drop_sinks=False)
    found = splice.effects(site, sae, [rows[:2], rows[2:]], mean, np.ones(50, np.int32))
    tokens = torch.from_numpy(rows)
    base = model(tokens).double().log_softmax(-1)
    edits = {"with_sae": sae, "with_ablation": torch.zeros_like, "with_mean_ablation": lambda x: x * 0 + 0.1}
    for variant, change in edits.items():
        with edit(model, {name: change}):
            log_probs = model(tokens).double().log_softmax(-1)
        nats = -log_probs[:, :-1].gather(-1, tokens[:, 1:, None]).mean().item()
        divergence = (base.exp() * (base - log_probs)).sum(-1).mean().item()
        assert found[variant].cross_entropy == pytest.approx(nats, rel=1e-5)
        assert found[variant].bits_per_byte == pytest.approx(nats / math.log(2), rel=1e-5)
        assert found[variant].divergence == pytest.approx(divergence, rel=1e-4)
    assert found["without_sae"].divergence == 0


def test_results_do_not_depend_on_the_batches_but_for_the_old_variance():
    model = tiny("G5")
    rows = np.random.default_rng(0).integers(0, 50, (6, 12))
    sae = toy_sae("topk", 32, 64, k=5)
    whole, parts = (
        measure(Site(model, "blocks.2.hook_mlp_out", (0,), tokens_per_forward=n), sae, rows, np.ones(50, np.int32))[0]
        for n in (1000, 12)
    )
    assert whole["reconstruction_quality"].pop("explained_variance_legacy") != pytest.approx(
        parts["reconstruction_quality"].pop("explained_variance_legacy")
    )
    for name in ("model_behavior_preservation", "model_performance_preservation", "bits_per_byte", "shrinkage"):
        assert whole[name] == pytest.approx(parts[name], rel=1e-4), name
    assert whole["latents"] == pytest.approx(parts["latents"], rel=1e-4)


def test_a_perfect_sae_scores_one_and_the_model_is_left_as_it_was():
    model = tiny("G5")
    rows = np.random.default_rng(0).integers(0, 50, (2, 12))
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    weights = {"W_enc": both.T.contiguous(), "W_dec": both, "b_dec": torch.zeros(32), "b_enc": torch.zeros(64)}
    perfect = TorchSAE({"architecture": "standard", "d_in": 32, "d_sae": 64}, weights)
    before = model(torch.from_numpy(rows))
    summary, _ = measure(Site(model, "blocks.1.hook_attn_out", (0,)), perfect, rows, np.ones(50, np.int32))
    assert torch.equal(model(torch.from_numpy(rows)), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert summary["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert summary["model_behavior_preservation"]["kl_div_score"] == pytest.approx(1, abs=1e-5)
    assert summary["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("architecture", FORMS)
def test_every_exported_form_is_measured(architecture):
    rows = np.random.default_rng(0).integers(0, 50, (2, 12))
    site = Site(tiny("G2"), "blocks.1.hook_resid_post", (0,))
    summary, columns = measure(site, toy_sae(architecture, 32, 64), rows, np.ones(50, np.int32))
    assert 0 < summary["l0"] < 64
    assert all(values.shape == (64,) for values in columns.values())
    json.dumps(core.finite(summary), allow_nan=False)


def test_duplicated_and_lonely_latents_are_found():
    rows = torch.tensor([[1.0, 0], [0.99, 0.05], [0, 1]])
    assert latents.nearest(rows).tolist() == pytest.approx(
        [0.99 / math.hypot(0.99, 0.05)] * 2 + [0.05 / math.hypot(0.99, 0.05)]
    )
    assert math.isnan(latents.nearest(rows[:1]).item())
    columns = {
        "feature_density": np.array([0.5, 0.02, 0.0]),
        "max_decoder_cosine_sim": latents.nearest(rows).numpy(),
        "encoder_decoder_cosine_sim": np.zeros(3),
        "encoder_norm": np.ones(3),
        "encoder_bias": np.zeros(3),
        "consistent_activation_heuristic": np.array([4.0, 2.0, np.nan]),
    }
    summary = latents.summary(columns)
    assert (summary["duplicated"], summary["dead"]) == (2, 1)
    assert (summary["dense_over_1_percent"], summary["dense_over_10_percent"]) == (2, 1)
    assert summary["mean_consistent_activation_heuristic"] == 3


def test_undefined_metrics_are_none_in_json():
    value = {"a": math.nan, "b": [1.0, math.inf], "c": np.array([0.5, np.nan]), "d": np.float32(2), "e": "x", 3: None}
    assert core.finite(value) == {"a": None, "b": [1.0, None], "c": [0.5, None], "d": 2.0, "e": "x", "3": None}


def test_text_of_one_token_over_and_over_has_no_scores_but_none():
    summary, _ = measure(Site(ByHand(), HOOK, (BOS,)), SHRINKING, np.array([[BOS, A, A]]), BYTES)
    found = core.finite(summary)
    assert found["reconstruction_quality"]["explained_variance"] is None
    assert found["latents"]["mean_consistent_activation_heuristic"] == 2


def test_other_widths_empty_text_and_broken_models_are_refused():
    model = tiny("G5")
    rows = np.zeros((1, 4), np.int64)
    with pytest.raises(ValueError, match=r"width 2 cannot read blocks.1.hook_resid_post of width 32"):
        reconstruction(model, SHRINKING, [rows], "blocks.1.hook_resid_post", excluded=())
    with pytest.raises(ValueError, match="no held-out text"):
        reconstruction(model, SHRINKING, [], "blocks.1.hook_resid_post", excluded=())
    with pytest.raises(ValueError, match="no tokens"):
        measure(Site(ByHand(), HOOK, (BOS,)), SHRINKING, np.array([[BOS, BOS]]), BYTES)
    broken = ByHand()
    broken.wte.weight[A] = torch.nan
    with pytest.raises(ValueError, match=r"2 numbers of blocks.0.hook_resid_post are not finite"):
        measure(Site(broken, HOOK, (BOS,)), SHRINKING, np.array([[BOS, A, B]]), BYTES)


class AsTransformerLens:
    """As much of a hooked transformer and of an activation store as SAELens's own evaluation asks for."""

    cfg = None

    def __init__(self, model: nn.Module, rows: np.ndarray):
        self.model, self.rows = model, torch.from_numpy(rows)

    def __call__(self, tokens, **_):
        logits = self.model(tokens)
        nats = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return logits, nats.view(len(tokens), -1)

    def run_with_hooks(self, tokens, fwd_hooks, **_):
        ((name, hook),) = fwd_hooks
        with edit(self.model, {name: lambda acts: hook(acts, hook=None)}):
            return self(tokens)

    def run_with_cache(self, tokens, names_filter, **_):
        with capture(self.model, names_filter) as acts:
            return self.model(tokens), dict(acts)

    def get_batch_tokens(self, n):
        return self.rows


def test_saelens_measures_the_same(tmp_path):
    import sae_lens.evals  # takes seconds, and the other tests here are quick

    name = "blocks.2.hook_resid_post"
    ours = toy_sae("jumprelu", 32, 64, hook_name=name, sae_lens_version="6.54.12")
    ours.cfg |= {"dtype": "float32", "device": "cpu"}
    theirs = sae_lens.SAE.load_from_disk(str(export(ours, tmp_path / "sae")))
    model, rows = tiny("G5"), np.random.default_rng(0).integers(0, 50, (3, 20))
    site = Site(model, name, (), drop_sinks=False)  # SAELens ablates everywhere, BOS and sinks too
    summary, columns = measure(site, ours, rows, np.ones(50, np.int32))

    hooked, scaler = AsTransformerLens(model, rows), sae_lens.evals.ActivationScaler()
    kept = sae_lens.evals.get_downstream_reconstruction_metrics(
        theirs, hooked, hooked, scaler, compute_kl=True, compute_ce_loss=True, n_batches=1, eval_batch_size_prompts=3
    )
    made, by_latent = sae_lens.evals.get_sparsity_and_variance_metrics(
        theirs,
        hooked,
        hooked,
        scaler,
        n_batches=1,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=3,
        model_kwargs={},
    )
    found = {name: value for group in summary.values() if isinstance(group, dict) for name, value in group.items()}
    assert len(kept | made) == 17
    for name, value in (kept | made).items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    by_latent |= sae_lens.evals.get_featurewise_weight_based_metrics(theirs)
    for name, values in by_latent.items():
        np.testing.assert_allclose(columns[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
