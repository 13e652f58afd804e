"""Attribution graphs on the explorer's page from disk, in a real Chromium, and the files that it reads."""

import copy
import json
from collections.abc import Callable
from typing import Any

import graph_toy
import pytest
from chromium import ENOUGH, PHONE, assert_fits, contrasts
from graph_toy import BOS, CAT, ERROR, FIRES, HOSTILE, LOGIT, LOW, OTHER, SCRIPT, TOP

from bridge.circuits import graph_check
from bridge.explorer import graphs, page
from bridge.run import Run

PROTOTYPE = "circuit-tracer"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """The toy run with records of transcoders, two graphs and the page."""
    run = Run(graph_toy.write_run(tmp_path_factory.mktemp("runs") / "toy"))
    digests = graph_toy.digests(run.path)
    graphs.add(run, graph_toy.document(digests, "older"))
    graphs.add(run, graph_toy.document(digests))
    page.write(run.path)
    return run


@pytest.fixture
def tab(visit, run) -> Any:
    return visit(f"{run.page_file.as_uri()}#view=graph&graph=toy", wait=".picture .node")


def node(tab: Any, name: str) -> Any:
    return tab.locator(f".node[data-id='{name}']")


def drawn(tab: Any) -> set[str]:
    return {one.get_attribute("data-id") for one in tab.query_selector_all(".picture .node")}


def links(tab: Any) -> set[tuple[str, str]]:
    ends = [
        [one.get_attribute(f"data-{end}") for end in ("source", "target")] for one in tab.query_selector_all(".link")
    ]
    return {tuple(pair) for pair in ends if pair[0]}


def center(tab: Any, name: str) -> tuple[float, float]:
    box = node(tab, name).locator(".hit").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def of(name: str) -> set[tuple[str, str]]:
    return {pair for pair in graph_toy.WEIGHTS if name in pair}


# ---- the files ------------------------------------------------------------------------------------------------------


def test_the_toy_is_a_graph_that_other_pages_show():
    graph_check.check(graph_toy.document())


def test_the_latest_graph_is_first_in_the_list_and_one_of_a_name_is_replaced(run, tmp_path):
    assert [entry["slug"] for entry in graphs.listed(run)] == ["toy", "older"]
    other = Run(tmp_path)
    for slug in ("a", "b", "a"):
        graphs.add(other, graph_toy.document(slug=slug))
    assert [entry["slug"] for entry in graphs.listed(other)] == ["a", "b"]
    assert graphs.listed(other)[0]["nodes"] == 11
    (other.shown_graphs_folder / "list.js").write_text("jsae.put(")
    with pytest.raises(ValueError, match=r"list\.js is no list of graphs: move it away"):
        graphs.add(other, graph_toy.document())


def test_a_page_without_records_shows_graphs_only(visit, tmp_path):
    run = Run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no records"):
        page.write(run.path)
    graphs.add(run, graph_toy.document())
    assert not page.is_current(run)
    page.write(run.path)
    assert page.is_current(run)
    tab = visit(f"{run.page_file.as_uri()}", wait=".picture .node")
    assert tab.locator("#tabs a").all_inner_texts() == ["Graphs"]
    node(tab, FIRES).click()
    assert "label 0" in tab.inner_text("#node")
    assert tab.locator(".texts-of").count() == 0


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_tokens_are_at_the_bottom_layers_above_and_logits_on_top(tab):
    heights = [center(tab, name)[1] for name in (CAT, LOW, FIRES, TOP, LOGIT)]
    assert heights == sorted(heights, reverse=True)
    across = [center(tab, name)[0] for name in (BOS, SCRIPT, CAT, LOGIT)]
    assert across == sorted(across)
    assert tab.locator(".rowname").all_text_contents() == ["tokens", "L0", "L1", "L2", "logits"]
    assert abs(center(tab, LOW)[0] - center(tab, CAT)[0]) < 1
    assert "Why “ cat”?" in tab.inner_text("h1")
    assert "<script>alert(1)</script>" in tab.inner_text(".asked")


def test_a_node_shows_its_links_its_label_and_where_it_fires(tab, run):
    node(tab, FIRES).click()
    tab.mouse.move(5, 5)
    assert links(tab) == of(FIRES)
    assert tab.inner_text("#node") == "token ' cat'"  # of the records: the file has another
    assert "L1 #0 on “ cat”" in tab.inner_text(".about")
    tab.wait_for_selector(".texts-of .kwic")
    assert " cat" in tab.locator(".texts-of .peak").all_inner_texts()
    inputs = tab.locator("[data-side=source] li").all_inner_texts()
    assert [text.split("\n")[-1] for text in inputs] == ["+3", "+1"]
    tab.click(".about a")
    tab.wait_for_selector(".latent[data-latent='0']")
    assert f"hook={graph_toy.HOOKS[1]}" in tab.url.replace("%3A", ":")
    tab.go_back()
    tab.wait_for_selector("#node")


def test_links_are_followed_by_clicks(tab):
    node(tab, LOGIT).click()
    tab.click(f"[data-side=source] [data-id='{TOP}']")
    assert node(tab, TOP).get_attribute("aria-pressed") == "true"
    tab.click(f"[data-side=source] [data-id='{FIRES}']")
    tab.click(f"[data-side=source] [data-id='{LOW}']")
    assert tab.locator("[data-side=target] [data-id]").get_attribute("data-id") == FIRES
    tab.click("#unselect")
    assert tab.locator("#node").count() == 0


def test_only_inputs_or_outputs_are_shown_if_one_wants(tab):
    node(tab, FIRES).click()
    tab.mouse.move(5, 5)
    tab.click(".segmented [data-value=input]")
    assert links(tab) == {pair for pair in of(FIRES) if pair[1] == FIRES}
    tab.click(".segmented [data-value=output]")
    assert links(tab) == {pair for pair in of(FIRES) if pair[0] == FIRES}


def test_a_feature_under_the_pointer_shows_its_texts(tab):
    node(tab, FIRES).hover()
    tab.wait_for_function("() => document.querySelector('#tip').textContent.includes('⟦ cat⟧')")
    assert "activation" in tab.inner_text("#tip")
    assert links(tab) == of(FIRES)
    node(tab, HOSTILE).hover()
    tab.wait_for_function("() => document.querySelector('#tip').textContent.includes('token')")


def test_sliders_prune_nodes_and_links(tab):
    everything = {*graph_toy.INFLUENCE, LOGIT, OTHER, BOS, SCRIPT, CAT, graph_toy.LINE}
    assert drawn(tab) == everything - {ERROR}  # the file's threshold is 0.9
    assert tab.inner_text("#graphcount") == "4 of 5 features and errors"
    tab.locator("#prunenodes").fill("0.6")
    assert drawn(tab) == everything - {ERROR, LOW, HOSTILE}
    tab.locator("#prunenodes").fill("1")
    assert drawn(tab) == everything
    tab.locator("#prunelinks").fill("1")
    assert links(tab) == set(graph_toy.WEIGHTS)
    tab.locator("#prunelinks").fill("0")
    assert links(tab) == set()
    tab.locator("#prunelinks").fill("0.4")  # by hand: TOP to LOGIT has 2 / 3.5 of the 0.6 of its logit
    assert links(tab) < set(graph_toy.WEIGHTS)
    assert (TOP, LOGIT) in links(tab)


# ---- pins, groups, the saved view -----------------------------------------------------------------------------------


def test_pinned_nodes_are_grouped_named_and_taken_apart(tab):
    for name in (LOW, FIRES, TOP, LOGIT):
        node(tab, name).click(modifiers=["Shift"])
    assert tab.locator(".box").count() == 4
    tab.click("#togroup")
    tab.click(f".box[data-key='{LOW}']")
    tab.click(f".box[data-key='{FIRES}']")
    tab.fill("#newgroup", "<b>cats</b>")
    tab.click("#makegroup")
    assert tab.locator(".box").count() == 3
    assert "<b>cats</b>\n2 nodes" in tab.inner_text(".box.group")
    tab.locator(".box.group").hover()
    told = tab.inner_text("#tip")  # the sum of the effects of both on each
    assert "+1.5" in told
    assert "+1" in told
    tab.fill("#groupname", "cats")
    tab.press("#groupname", "Enter")
    assert "cats\n2 nodes" in tab.inner_text(".box.group")
    tab.click("#ungroup")
    assert tab.locator(".box").count() == 4
    tab.click("#unpinall")
    assert tab.locator(".box").count() == 0


def test_a_view_survives_a_reload_and_a_saved_file(tab, visit, run, tmp_path):
    for name in (LOW, FIRES):
        node(tab, name).click(modifiers=["Shift"])
    tab.click("#togroup")
    tab.click(f".box[data-key='{FIRES}']")
    tab.fill("#newgroup", "a, b & “c”")
    tab.click("#makegroup")
    node(tab, TOP).click()
    tab.locator("#prunenodes").fill("0.8")
    tab.wait_for_function("() => location.hash.includes('pruningThreshold=0.8')")
    with tab.expect_download() as download:
        tab.click("#savegraph")
    file = tmp_path / "saved.json"
    download.value.save_as(file)
    saved = json.loads(file.read_text(encoding="utf-8"))
    graph_check.check(saved)
    assert saved["qParams"]["pinnedIds"] == [LOW, FIRES]
    assert saved["qParams"]["supernodes"] == [["a, b & “c”", FIRES]]
    assert saved["qParams"]["clickedId"] == TOP
    assert {key: saved[key] for key in ("nodes", "links")} == {
        key: graph_toy.document()[key] for key in ("nodes", "links")
    }
    tab.reload()
    again = visit(run.page_file.as_uri())
    again.goto(f"{run.page_file.as_uri()}#view=graph&graph=older")
    again.wait_for_selector(".picture .node")
    again.set_input_files("#graphfile", file)
    for one in (tab, again):
        one.wait_for_selector(".box.group")
        assert "a, b & “c”" in one.inner_text(".box.group")
        assert one.locator(f".box[data-key='{LOW}']").count() == 1
        assert node(one, TOP).get_attribute("aria-pressed") == "true"
        assert one.input_value("#prunenodes") == "0.8"


def test_views_that_circuit_tracer_saves_as_text_are_read(tab, tmp_path):
    document = graph_toy.document()
    document["qParams"] = {
        "pinnedIds": f"{LOW},{TOP},gone",
        "supernodes": json.dumps([["group", LOW, "gone"]]),
        "linkType": "?",
    }
    (tmp_path / "graph.json").write_text(json.dumps(document))
    tab.set_input_files("#graphfile", tmp_path / "graph.json")
    tab.wait_for_selector(".box.group")
    assert tab.locator(".box").count() == 2


# ---- files of others ------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    document = copy.deepcopy(graph_toy.document())
    change(document)
    return json.dumps(document)


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "this file is not JSON"),
        ("{", "this file is not JSON"),
        (DEEP, "this file is not JSON"),
        ("[]", "it is no object"),
        ("null", "it is no object"),
        ('{"metadata": []}', "it has no metadata"),
        (changed(lambda d: d["metadata"].pop("prompt_tokens")), "metadata.prompt_tokens is missing"),
        (changed(lambda d: d["metadata"].update(prompt_tokens=[1])), "metadata.prompt_tokens is not all text"),
        (changed(lambda d: d["metadata"].update(prompt_tokens=["a"] * 9999)), "at most 4,096 are shown"),
        (changed(lambda d: d.pop("links")), "nodes or links are missing"),
        (changed(lambda d: d.update(nodes=[])), "it has no nodes"),
        (changed(lambda d: d.update(nodes=[{}] * 20_001)), "at most 20,000"),
        (changed(lambda d: d["nodes"].append(3)), "nodes[11] is no object"),
        (changed(lambda d: d["nodes"].append(d["nodes"][0])), 'two nodes have the id "E_18_0"'),
        (changed(lambda d: d["nodes"][4].update(layer=1e9)), "nodes[4]: layer is 1000000000"),
        (changed(lambda d: d["nodes"][4].update(layer="__proto__")), 'nodes[4]: layer is "__proto__"'),
        (changed(lambda d: d["nodes"][4].update(layer=None)), "nodes[4]: layer is null"),
        (changed(lambda d: d["nodes"][9].update(layer=600)), "nodes[9]: layer is 600"),
        (changed(lambda d: d["nodes"][4].update(ctx_idx=4)), "the prompt has tokens 0 to 3"),
        (changed(lambda d: d["nodes"][4].update(influence="high")), 'influence is "high"'),
        (changed(lambda d: d["links"][0].update(weight=None)), "links[0]: weight is null"),
        (changed(lambda d: d["links"][0].update(weight=1)).replace('"weight": 1}', '"weight": 1e999}', 1), "links[0]"),
        (changed(lambda d: d["links"].append("x")), "links[14] is no object"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_graph_gives_one_line_and_leaves_the_former(tab, tmp_path, text, told):
    (tmp_path / "graph.json").write_text(text)
    tab.set_input_files("#graphfile", tmp_path / "graph.json")
    tab.wait_for_selector("#graphstatus [role=alert]")
    line = tab.inner_text("#graphstatus")
    assert told in line
    assert "\n" not in line
    assert len(line) < 300
    assert drawn(tab) >= {FIRES, LOGIT}


def test_links_to_nowhere_and_downwards_are_left_out_and_counted(tab, tmp_path):
    document = graph_toy.document()
    document["links"] += [
        {"source": "gone", "target": TOP, "weight": 1.0},
        {"source": TOP, "target": LOW, "weight": 9.0},
    ]
    (tmp_path / "graph.json").write_text(json.dumps(document))
    tab.set_input_files("#graphfile", tmp_path / "graph.json")
    tab.wait_for_function("() => document.querySelector('#graphstatus').textContent.startsWith('2 links are left out')")
    node(tab, TOP).click()
    tab.mouse.move(5, 5)
    assert links(tab) == of(TOP)


def test_a_graph_of_other_transcoders_shows_its_own_labels_without_texts(tab, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(graph_toy.document(["0" * 64] * 3)))
    tab.set_input_files("#graphfile", tmp_path / "graph.json")
    tab.wait_for_selector("#whichgraph option[value='']", state="attached")
    node(tab, FIRES).click()
    assert tab.inner_text("#node") == "<b>label 0</b>"
    assert tab.locator(".texts-of").count() == 0


def test_a_graph_that_the_run_does_not_have_is_named(visit, run):
    tab = visit(
        f"{run.page_file.as_uri()}#view=graph&graph=nothing", expected="ERR_FILE_NOT_FOUND", wait="#graphstatus"
    )
    tab.wait_for_selector("#graphstatus [role=alert]")
    assert tab.inner_text("#graphstatus") == "no graph nothing in this run: there are toy, older"


# ---- keyboard, phone, contrast --------------------------------------------------------------------------------------


def test_the_keyboard_reaches_selects_and_pins_nodes(tab):
    tab.focus(".picture")
    tab.keyboard.press("ArrowRight")
    focused = "() => document.activeElement.dataset.id"
    assert tab.evaluate(focused) == BOS
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate(focused) == CAT
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate(focused) == LOW
    tab.keyboard.press("o")
    assert tab.evaluate(focused) == FIRES
    tab.keyboard.press("i")
    assert tab.evaluate(focused) == LOW
    tab.keyboard.press("Enter")
    assert tab.inner_text("#node") == "any token"
    tab.keyboard.press("p")
    assert tab.locator(".box").count() == 1
    tab.keyboard.press("Escape")
    assert tab.locator("#node").count() == 0
    assert "view=graph" in tab.url
    tab.keyboard.press("j")  # of the list of latents
    assert "view=graph" in tab.url


def test_a_phone_shows_the_graph_and_what_is_selected(visit, run):
    tab = visit(f"{run.page_file.as_uri()}#view=graph&graph=toy", wait=".picture .node", viewport=PHONE, has_touch=True)
    assert tab.is_visible("#tabs [data-view=graph]")
    node(tab, FIRES).tap()
    tab.wait_for_selector("#node")
    tab.tap("#pin")
    assert_fits(tab, ".page")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable(visit, run, scheme):
    tab = visit(
        f"{run.page_file.as_uri()}#view=graph&graph=toy&clickedId={FIRES}&pinnedIds={FIRES},{TOP}",
        wait=".picture .node",
        color_scheme=scheme,
    )
    tab.wait_for_selector(".texts-of .kwic")
    assert [one for one in contrasts(tab) if one[0] < ENOUGH] == []
