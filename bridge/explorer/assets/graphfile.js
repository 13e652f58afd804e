/* Attribution graphs: reading of files, of this project and of others, influence, and the saved view. */
"use strict";

(() => {
  const MOST = { bytes: 100 * 2 ** 20, tokens: 4096, nodes: 20000, links: 1000000, layer: 512, text: 512, groups: 200 };
  const KINDS = { "cross layer transcoder": "feature", "mlp reconstruction error": "error", embedding: "token", logit: "logit" };
  const LINKS = ["both", "input", "output"];

  /* Return the graph in a text; throw an Error with one line that says what is wrong with it. */
  function parse(text) {
    if (text.length > MOST.bytes) throw new Error(`the file has more than ${MOST.bytes / 2 ** 20} MiB, the most that this page reads: prune the graph more`);
    let value;
    try {
      value = JSON.parse(text);
    } catch (error) {
      throw new Error(`this file is not JSON (${String(error.message).slice(0, 80)}): give a graph file of circuit-tracer, Neuronpedia or experiments.trace`);
    }
    return read(value);
  }

  /* Return a graph from the JSON value of a file; see `parse`. */
  function read(value) {
    check(isObject(value), "it is no object with metadata, nodes and links");
    const metadata = value.metadata;
    check(isObject(metadata), "it has no metadata");
    const tokens = listOf(metadata.prompt_tokens, "metadata.prompt_tokens", MOST.tokens, (token) => typeof token === "string", "text").map(text);
    check(tokens.length > 0, "its prompt has no tokens");
    check(Array.isArray(value.nodes) && Array.isArray(value.links), "nodes or links are missing, or no lists");
    for (const [name, list] of [["nodes", value.nodes], ["links", value.links]]) {
      check(list.length <= MOST[name], `it has ${jsae.whole(list.length)} ${name}, and this page shows at most ${jsae.whole(MOST[name])}: prune it more`);
    }
    const byId = new Map();
    value.nodes.forEach((item, i) => {
      const node = readNode(item, i, tokens.length);
      check(!byId.has(node.id), `two nodes have the id ${quoted(node.id)}`);
      byId.set(node.id, node);
    });
    const nodes = [...byId.values()];
    check(nodes.length > 0, "it has no nodes");
    const top = nodes.reduce((most, { kind, layer }) => Math.max(most, kind === "token" ? 0 : kind === "logit" ? layer - 1 : layer + 1), 0);
    for (const node of nodes) node.row = { token: 0, logit: top + 1 }[node.kind] ?? node.layer + 1;
    const links = [];
    let lost = 0;
    value.links.forEach((item, i) => {
      const link = readLink(item, i, byId);
      if (link) links.push(link);
      else lost++;
    });
    const graph = {
      metadata, tokens, nodes, byId, layers: top, links, lost, document: value,
      slug: text(metadata.slug), prompt: typeof metadata.prompt === "string" ? metadata.prompt : tokens.join(""),
      digests: Array.isArray(metadata.sae_sha256) ? metadata.sae_sha256 : [],
    };
    weigh(graph);
    graph.view = readView(isObject(value.qParams) ? value.qParams : {}, graph);
    return graph;
  }

  function readNode(item, i, length) {
    const where = `nodes[${i}]`;
    check(isObject(item), `${where} is no object`);
    const { node_id: id, ctx_idx: position, feature_type: type } = item;
    check(typeof id === "string" && id.length <= MOST.text, `${where}: node_id is ${quoted(id)}, and no short text`);
    check(typeof type === "string", `${where}: feature_type is ${quoted(type)}, and no text`);
    check(Number.isInteger(position) && position >= 0 && position < length, `${where}: ctx_idx is ${quoted(position)}, and the prompt has tokens 0 to ${length - 1}`);
    const kind = KINDS[type] ?? "feature";
    const layer = kind === "token" ? 0 : Number(item.layer); // of a logit the number of layers and 1
    check(kind === "token" || (/^\d{1,4}$/.test(String(item.layer)) && layer <= MOST.layer), `${where}: layer is ${quoted(item.layer)}, and no number from 0 to ${MOST.layer}`);
    const label = text(item.clerp);
    return {
      id, kind, layer, position, label, latent: kind === "feature" ? latentOf(id, layer, position, item.feature) : null,
      influence: optional(item.influence, `${where}: influence`), activation: optional(item.activation, `${where}: activation`),
      probability: optional(item.token_prob, `${where}: token_prob`) ?? 0, token: kind === "logit" ? outputOf(label) : null,
      inputs: [], outputs: [],
    };
  }

  function readLink(item, i, byId) {
    const where = `links[${i}]`;
    check(isObject(item), `${where} is no object`);
    check(typeof item.source === "string" && typeof item.target === "string", `${where}: source or target is no text`);
    check(typeof item.weight === "number" && Number.isFinite(item.weight), `${where}: weight is ${quoted(item.weight)}, and no finite number`);
    const [source, target] = [byId.get(item.source), byId.get(item.target)];
    if (!source || !target || source.row >= target.row) return null; // the other pages drop these too
    return { source, target, weight: item.weight };
  }

  /* Return the latent of a feature: from its id LAYER_LATENT_POSITION, else from its Cantor pairing. */
  function latentOf(id, layer, position, number) {
    const parts = id.split("_");
    if (parts.length === 3 && Number(parts[0]) === layer && Number(parts[2]) === position && /^\d{1,9}$/.test(parts[1])) return Number(parts[1]);
    if (!Number.isSafeInteger(number) || number < 0) return null;
    const diagonal = Math.floor((Math.sqrt(8 * number + 1) - 1) / 2);
    const latent = number - (diagonal * (diagonal + 1)) / 2;
    return diagonal - latent === layer ? latent : null;
  }

  /* Return the token of a logit: its label is like `Output "x" (p=0.1)`. */
  const outputOf = (label) => /"([\s\S]*)" \(p=[0-9.]+\)$/.exec(label)?.[1] ?? label;

  /* Add to every link its share of the input of its target, and its score; order links by score.

     The influence of a node is the sum over all paths to the logits of products of these shares, weighted by the
     probabilities of the logits (circuit-tracer). A link's score is its share times the influence of its target, and
     its `place` is the share of all scores that it has with those of higher scores. */
  function weigh(graph) {
    const rest = graph.nodes.filter(({ kind }) => kind === "logit");
    const even = rest.every(({ probability }) => !(probability > 0));
    for (const link of graph.links) {
      link.target.inputs.push(link);
      link.source.outputs.push(link);
    }
    for (const node of graph.nodes) node.total = node.kind === "logit" ? (even ? 1 / rest.length : Math.max(0, node.probability)) : 0;
    for (const node of [...graph.nodes].sort((a, b) => b.row - a.row)) {
      const size = node.inputs.reduce((sum, { weight }) => sum + Math.abs(weight), 0);
      for (const link of node.inputs) {
        link.share = size > 0 ? Math.abs(link.weight) / size : 0;
        link.score = link.share * node.total;
        link.source.total += link.score;
      }
    }
    graph.links.sort((a, b) => b.score - a.score);
    accumulate(graph.links, (link) => link.score, (link, place) => { link.place = place; });
    const inner = graph.nodes.filter(({ kind }) => kind !== "logit").sort((a, b) => b.total - a.total);
    accumulate(inner, (node) => node.total, (node, place) => { node.influence ??= place; });
    const strong = (a, b) => Math.abs(b.weight) - Math.abs(a.weight);
    for (const node of graph.nodes) {
      node.inputs.sort(strong);
      node.outputs.sort(strong);
    }
  }

  function accumulate(items, value, put) {
    const all = items.reduce((sum, item) => sum + value(item), 0) || 1;
    let sum = 0;
    for (const item of items) {
      sum += value(item);
      put(item, Math.min(1, sum / all));
    }
  }

  /* ---- the saved view: Neuronpedia's qParams, in files as lists, in addresses (and files of circuit-tracer) as text ---- */

  function readView(saved, graph) {
    const known = (ids) => [...new Set(ids.filter((id) => graph.byId.has(id)))];
    const settings = isObject(graph.metadata.pruning_settings) ? graph.metadata.pruning_settings : {};
    const groups = lists(saved.supernodes).filter((group) => Array.isArray(group) && group.every((one) => typeof one === "string"))
      .slice(0, MOST.groups).map(([label, ...ids]) => ({ label: text(label), ids: known(ids) })).filter(({ ids }) => ids.length);
    const taken = new Set(); // a node is in one group
    for (const group of groups) {
      group.ids = group.ids.filter((id) => !taken.has(id));
      for (const id of group.ids) taken.add(id);
    }
    return {
      pinned: known([...lists(saved.pinnedIds, ","), ...groups.flatMap(({ ids }) => ids)]),
      groups: groups.filter(({ ids }) => ids.length),
      links: LINKS.includes(saved.linkType) ? saved.linkType : "both",
      clicked: graph.byId.has(saved.clickedId) ? saved.clickedId : "",
      positions: typeof saved.sg_pos === "string" ? saved.sg_pos.slice(0, 1e5) : "",
      nodes: share(saved.pruningThreshold) ?? share(settings.node_threshold) ?? 1,
      edges: share(saved.edgeThreshold) ?? 0.8,
    };
  }

  /* Return a list that may be given as text, separated or as JSON. */
  function lists(value, separator) {
    if (Array.isArray(value)) return value;
    if (typeof value !== "string" || !value) return [];
    if (separator && !value.startsWith("[")) return value.split(separator);
    try {
      const parsed = JSON.parse(value);
      return Array.isArray(parsed) ? parsed : [];
    } catch {
      return [];
    }
  }

  function share(value) {
    const number = typeof value === "string" && value !== "" ? Number(value) : value;
    return typeof number === "number" && number >= 0 && number <= 1 ? number : null;
  }

  /* Return the document of a graph with its view as qParams. */
  const saved = (graph, view) => ({
    ...graph.document,
    qParams: {
      ...(isObject(graph.document.qParams) ? graph.document.qParams : {}),
      pinnedIds: view.pinned, supernodes: view.groups.map(({ label, ids }) => [label, ...ids]), linkType: view.links,
      clickedId: view.clicked, sg_pos: view.positions, pruningThreshold: String(view.nodes), edgeThreshold: String(view.edges),
    },
  });

  /* Return the view as fields of an address. */
  const fields = (view) => Object.entries({
    clickedId: view.clicked, pinnedIds: view.pinned.join(","), linkType: view.links === "both" ? "" : view.links,
    supernodes: view.groups.length ? JSON.stringify(view.groups.map(({ label, ids }) => [label, ...ids])) : "",
    pruningThreshold: String(view.nodes), edgeThreshold: String(view.edges),
  }).filter(([, value]) => value !== "");

  /* ---- checks ---- */

  const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  const quoted = (value) => String(JSON.stringify(value) ?? value).slice(0, 40);
  const text = (value) => (typeof value === "string" ? value.slice(0, MOST.text) : "");

  function check(holds, problem) {
    if (!holds) throw new Error(`this is not a graph that can be shown: ${problem}`);
  }

  function optional(value, where) {
    if (value === null || value === undefined) return null;
    check(typeof value === "number" && Number.isFinite(value), `${where} is ${quoted(value)}, and no finite number`);
    return value;
  }

  function listOf(value, where, most, holds, kind) {
    check(Array.isArray(value), `${where} is missing, or no list`);
    check(value.length <= most, `${where} has ${jsae.whole(value.length)} entries, and at most ${jsae.whole(most)} are shown`);
    check(value.every(holds), `${where} is not all ${kind}`);
    return value;
  }

  jsae.graphFile = { MOST, parse, read, readView, saved, fields };
})();
