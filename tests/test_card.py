"""The card of a latent: its content, and that a hostile token stays text."""

import html.parser

import explorer_toy as toy
import pytest

from bridge.explorer.card import Card
from jsae.records.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(toy.write_store(tmp_path_factory.mktemp("run")))


class Elements(html.parser.HTMLParser):
    """The names of elements, and the text between them."""

    def __init__(self, markup: str):
        super().__init__()
        self.names: set[str] = set()
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)

    def handle_data(self, data):
        self.text += data


def test_it_shows_where_the_latent_fires(store):
    card = Card(store, toy.ORDINARY, "the token ' cat'", texts=2, around=3)
    assert len(card.examples) == 2
    for example in card.examples:
        assert {word for word, value in example if value > 0} == {" cat"}
        assert len(example) <= 7
    values = [max(value for _, value in example) for example in card.examples]
    assert values == sorted(values, reverse=True)
    assert values[0] == store["max"][toy.ORDINARY]
    assert "« cat»" in str(card)
    acts = toy.activations(toy.tokens())[..., toy.ORDINARY]
    assert card.density == pytest.approx((acts > 0).sum() / (toy.tokens() != toy.ID["<|bos|>"]).sum())


def test_tokens_are_text_and_never_markup(store):
    shown = Elements(Card(store, toy.HOSTILE, "<b>label</b>")._repr_html_())
    assert shown.names == {"div", "b", "span", "svg", "rect", "code"}
    assert "<script>alert(1)</script>" in shown.text
    assert "<b>label</b>" in shown.text


@pytest.mark.parametrize("latent", range(toy.D_SAE))
def test_every_kind_of_latent_has_a_card(store, latent):
    card = Card(store, latent)
    shown = Elements(card._repr_html_())
    assert f"latent {latent}" in shown.text
    assert ("svg" in shown.names) == (store["count"][latent] > 0)
    assert all(c.isprintable() or c == "\xa0" for c in shown.text)


def test_a_latent_that_is_not_there_is_refused(store):
    with pytest.raises(IndexError, match=r"latent 8: blocks\.2\.hook_resid_post has 0 to 7"):
        Card(store, 8)
