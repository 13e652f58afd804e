"""Files of lenses: what is written is read, also by torch; hostile and foreign files are refused by name."""

import pickle
import zipfile

import pytest
import torch
from tiny_nanochat import SIZES, tiny, tokens

from bridge import lenses
from bridge.lenses import JacobianLens, TunedLens, tuned
from bridge.lenses.lens import check_fits

WIDTH, LAYERS = SIZES["n_embd"], SIZES["n_layer"]


def matrices(seed: int = 0, layers=range(LAYERS), width: int = WIDTH) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(width, width, generator=generator) for layer in layers}


def tuned_lens() -> TunedLens:
    lens = tuned.new(tiny("G7"))
    return TunedLens(lens.signs, matrices(), {i: m[0] for i, m in matrices(1).items()}, {"tokens": 5})


def test_a_jacobian_lens_is_read_as_written_within_float16(tmp_path):
    lens = JacobianLens(matrices(), 17, {"model_fingerprint": "ab" * 32, "prompts": [0, 17], "text": "t 128"})
    lenses.save(lens, tmp_path / "deep" / "a.pt")
    read = lenses.load(tmp_path / "deep" / "a.pt")
    assert isinstance(read, JacobianLens)
    assert read.n_prompts == 17
    assert read.layers == list(range(LAYERS))
    assert read.provenance == lens.provenance | {"capture_point": "block_output", "stream_reduce": "none"}
    for layer in lens.layers:
        assert read.matrices[layer].dtype is torch.float32
        torch.testing.assert_close(read.matrices[layer], lens.matrices[layer], atol=0, rtol=2**-11)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_file_has_the_fields_that_neuronpedia_reads(tmp_path):
    lenses.save(JacobianLens(matrices(), 17), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(content) == {"J", "n_prompts", "source_layers", "d_model", "provenance"}
    assert content["source_layers"] == list(content["J"]) == list(range(LAYERS))
    assert {matrix.dtype for matrix in content["J"].values()} == {torch.float16}
    assert (content["d_model"], content["n_prompts"]) == (WIDTH, 17)
    assert content["provenance"] == {"capture_point": "block_output", "stream_reduce": "none"}


def test_a_lens_of_another_library_is_read(tmp_path):
    torch.save(
        {"J": {2: matrices()[2].half(), 0: matrices()[0].bfloat16()}, "n_prompts": 9, "d_model": WIDTH}, tmp_path / "a"
    )
    read = lenses.load(tmp_path / "a")
    assert read.layers == [0, 2]
    assert read.provenance == {}


def test_a_tuned_lens_is_read_as_written(tmp_path):
    lens = tuned_lens()
    lenses.save(lens, tmp_path / "t.pt")
    read = lenses.load(tmp_path / "t.pt")
    assert isinstance(read, TunedLens)
    assert read.signs == lens.signs
    assert read.provenance["tokens"] == 5
    streams = lenses.read(tiny("G7"), tokens(9))
    for layer in lens.layers:
        assert torch.equal(read.stream(streams, layer), lens.stream(streams, layer))


def test_numbers_that_do_not_fit_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"layer 1 has numbers that are not finite in torch\.float16"):
        lenses.save(JacobianLens({0: torch.eye(4), 1: 1e6 * torch.eye(4)}, 1), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


# ---- files of others ------------------------------------------------------------------------------------------------


class Evil:
    """Unpickles to a call."""

    def __reduce__(self):
        return print, ("executed",)


def content(**changes) -> dict:
    return {"J": matrices(), "n_prompts": 3, "source_layers": list(range(LAYERS)), "d_model": WIDTH} | changes


J = matrices()
BROKEN = {
    "a list": ([1], "it holds a list"),
    "nothing": ({}, "it has nothing"),
    "other weights": ({"wte.weight": torch.ones(2)}, "it has wte.weight: a Jacobian lens has J"),
    "no prompts": (content(n_prompts=0), "n_prompts is 0"),
    "many prompts": (content(n_prompts=2**60), "n_prompts is 1152921504606846976"),
    "prompts as a flag": (content(n_prompts=True), "n_prompts is True"),
    "no layers": (content(J={}), "J is not a dict of 1 to 1024 layers"),
    "J as a tensor": (content(J=J[0]), "J is not a dict"),
    "a named layer": (content(J={"a": J[0]}), "J has the layer a"),
    "a negative layer": (content(J={-1: J[0]}), "J has the layer -1"),
    "whole numbers": (content(J={0: torch.ones(4, 4, dtype=torch.long)}), "expected a tensor of floats"),
    "sparse": (content(J={0: torch.eye(4).to_sparse()}), "J.0. is a sparse tensor"),
    "a number": (content(J={0: 3.0}), "J.0. is float"),
    "no square": (content(J={0: torch.ones(4, 5)}), r"J\[0\] has the shape \(4, 5\)"),
    "two widths": (content(J={0: torch.eye(4), 1: torch.eye(5)}), r"J\[1\] has the shape \(5, 5\)"),
    "a scalar": (content(J={0: torch.tensor(1.0)}), r"J\[0\] has the shape \(\)"),
    "blown up": (content(J={0: torch.ones(1, 1).expand(60000, 60000)}), "its tensors have 14,400,000,000 bytes"),
    "one matrix for all": (content(J=dict.fromkeys(range(LAYERS), J[0])), "several are the same one"),
    "transposed": (content(J={0: J[0].T}), "not contiguous"),
    "NaN": (content(J={0: torch.eye(4) * float("nan")}, source_layers=[0], d_model=4), "not finite"),
    "another width": (content(d_model=7), "d_model is 7, but the matrices have width 32"),
    "other layers": (content(source_layers=[0]), "source_layers is not the list of its layers"),
    "another activation": (content(provenance={"capture_point": "mlp_out"}), "it reads capture_point mlp_out"),
    "another stream": (content(provenance={"stream_reduce": "mean"}), "it reads stream_reduce mean"),
    "provenance as text": (content(provenance="x"), "provenance is a str"),
    "no signs": ({"A": J, "b": {i: m[0] for i, m in J.items()}}, "signs does not give"),
    "other biases": ({"A": J, "b": {0: J[0][0]}, "signs": dict.fromkeys(J, 1.0)}, "A and b have other layers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_lens_is_refused_by_name(name, tmp_path):
    value, complaint = BROKEN[name]
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=complaint) as refused:
        lenses.load(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(refused.value)
    assert len(str(refused.value)) < 500


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save(content(provenance=Evil()), tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", pickle.dumps(Evil()))
    for name in ("evil", "old", "zip"):
        with pytest.raises(ValueError, match="is not a lens that can be read"):
            lenses.load(tmp_path / f"{name}.pt")
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError, match="no lens at"):
        lenses.load(tmp_path / "none.pt")


def test_a_damaged_file_is_noticed(tmp_path):
    lenses.save(JacobianLens(matrices(), 3), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(matrices()[1].half().numpy().tobytes()[:16]) + 40] ^= 1
    (tmp_path / "b.pt").write_bytes(data)
    (tmp_path / "c.pt").write_bytes(data[: len(data) // 2])
    for name in ("b", "c"):
        with pytest.raises(ValueError, match=f"{name}.pt is not a lens that can be read"):
            lenses.load(tmp_path / f"{name}.pt")


def test_odd_values_of_a_provenance_are_left_out(tmp_path):
    odd = {
        "text": "x" * 5000,
        "tensor": torch.eye(2),
        "deep": [[[[[[1]]]]]],
        "infinite": float("inf"),
        "fine": [1, "a"],
    }
    torch.save(content(provenance=odd), tmp_path / "a.pt")
    assert lenses.load(tmp_path / "a.pt").provenance == {"fine": [1, "a"]}


# ---- merging, and fitting to a model --------------------------------------------------------------------------------


def part(start: int, stop: int, seed: int = 0, **provenance) -> JacobianLens:
    about = {"prompts": [start, stop], "text": "abc 128", "model_fingerprint": "m"} | provenance
    return JacobianLens(matrices(seed), stop - start, about)


def test_lenses_merge_by_their_numbers_of_prompts():
    a, b, c = part(0, 10), part(10, 40, 1), part(40, 45, 2)
    merged = lenses.merge([lenses.merge([a, b]), c])
    assert merged.n_prompts == 45
    expected = (10 * a.matrices[2] + 30 * b.matrices[2] + 5 * c.matrices[2]) / 45
    torch.testing.assert_close(merged.matrices[2], expected, atol=1e-5, rtol=0)
    assert merged.provenance["model_fingerprint"] == "m"
    assert [one["prompts"] for one in merged.provenance["merged"]] == [[0, 10], [10, 40], [40, 45]]


def test_a_merged_lens_survives_its_file(tmp_path):
    lenses.save(lenses.merge([part(0, 10), part(10, 20)]), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="on prompts 10 to 19 and 15 to 24: their prompts must differ"):
        lenses.merge([lenses.load(tmp_path / "m.pt"), part(15, 25)])
    assert lenses.merge([lenses.load(tmp_path / "m.pt"), part(15, 25, text="other")]).n_prompts == 30


def test_lenses_that_do_not_belong_together_are_not_merged():
    refusals = {
        "give at least two": [part(0, 10)],
        "lenses of different models": [part(0, 10), part(10, 20, model_fingerprint="n")],
        "on prompts 0 to 9 and 9 to 19": [part(0, 10), part(9, 20)],
        r"of layers \[0, 1, 2, 3\] and width 32, and of layers \[1\]": [part(0, 1), JacobianLens(matrices(0, [1]), 1)],
        "width 32, and of layers .* and width 8": [part(0, 1), JacobianLens(matrices(0, width=8), 1)],
    }
    for complaint, several in refusals.items():
        with pytest.raises(ValueError, match=complaint):
            lenses.merge(several)


def test_a_lens_of_another_model_is_refused():
    model = tiny("G7")
    check_fits(part(0, 1), model)
    check_fits(part(0, 1), model, "m")
    for lens in (JacobianLens(matrices(width=8), 1), JacobianLens(matrices(layers=[4]), 1)):
        with pytest.raises(ValueError, match="the model has width 32 and layers 0 to 3"):
            check_fits(lens, model)
    with pytest.raises(ValueError, match="was fitted on a model with the weights 'm', not on this one, 'n'"):
        check_fits(part(0, 1), model, "n")
