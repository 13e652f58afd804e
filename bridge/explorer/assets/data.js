/* Read the records: base64 columns become typed arrays, files are loaded on demand. */
"use strict";

(() => {
  const { load } = jsae;

  function bytes(base64) {
    const text = atob(base64);
    const decoded = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) decoded[i] = text.charCodeAt(i);
    return decoded;
  }

  const column = (base64, Type) => new Type(bytes(base64).buffer);

  /* Return the offsets of parts of these lengths. */
  function offsets(lengths) {
    const sums = new Uint32Array(lengths.length + 1);
    for (let i = 0; i < lengths.length; i++) sums[i + 1] = sums[i] + lengths[i];
    return sums;
  }

  const data = { manifest: null, notes: [] }; // notes: those of people, from the server
  const lists = new Map();
  const texts = new Map();
  const nearest = new Map();
  const written = new Map();
  const traced = new Map();

  /* Load the manifest and the vocabulary. */
  data.open = async () => {
    const [manifest, vocabulary] = await Promise.all([load("manifest"), load("vocabulary")]);
    jsae.tokens.use(bytes(vocabulary.bytes), offsets(column(vocabulary.lengths, Uint16Array)), manifest.special);
    data.manifest = manifest;
    return manifest;
  };

  data.isTranscoder = ({ architecture }) => architecture.endsWith("transcoder");

  /* Return whether the server, if there is one, has the SAE of a hook: it has those of the page's own run. */
  data.isServed = (info) => Boolean(jsae.live) && !info.run;

  /* Return the number of the hook of this name; names of a second run begin with the name of the run. */
  data.hookNumber = (name) => data.manifest.hooks.findIndex((one) => one.name === name);

  /* Load the list of latents of hook number `hook`. */
  data.list = (hook) => {
    if (!lists.has(hook)) {
      const compared = data.manifest.hooks[hook].over_checkpoints;
      lists.set(hook, Promise.all([load(`list-${hook}`), compared && load(`timeline-${hook}`)]).then(([file, timeline]) => {
        const list = new Latents(hook, file);
        if (timeline) list.timeline = new jsae.stages.Timeline(timeline, column);
        for (const note of data.notes) if (note.hook === list.info.name) list.name(note);
        return list;
      }));
    }
    return lists.get(hook);
  };

  class Latents {
    constructor(hook, file) {
      this.hook = hook;
      this.info = data.manifest.hooks[hook];
      this.size = this.info.d_sae;
      this.count = column(file.count, Float64Array);
      this.max = column(file.max, Float32Array);
      this.mean = column(file.mean, Float32Array);
      this.f1 = column(file.f1, Float32Array);
      this.recurs = column(file.recurs, Float32Array); // share of other seeds; empty where it is not known
      this.places = file.places ? column(file.places, Float32Array) : null; // two numbers per latent
      this.labels = file.labels;
      this.byPerson = new Set(file.by_person.map(([latent]) => latent));
      this.automatic = new Map(file.by_person.map(([latent, label, f1]) => [latent, [label, f1 ?? NaN]]));
      this.notes = new Map(file.notes);
      this.fit = new Map(file.fit.map(([latent, precision, recall]) => [latent, { precision, recall }]));
      this.logits = column(file.logits, Uint16Array);
      this.perLatent = this.logits.length / this.size;
      this.snippets = column(file.snippets, Uint16Array);
      this.snippetOffsets = offsets(bytes(file.snippet_lengths));
      this.snippetPeaks = bytes(file.snippet_peaks);
      this.peaks = column(file.peaks, Uint16Array);
      this.peakOffsets = offsets(bytes(file.peak_lengths));
      this.haystacks = new Array(this.size);
      this.timeline = null; // what became of the latents over checkpoints, if there are several
    }

    density(latent) {
      return this.info.tokens ? this.count[latent] / this.info.tokens : 0;
    }

    dead(latent) {
      return this.count[latent] === 0;
    }

    dense(latent) {
      return this.density(latent) > 0.1;
    }

    /* Return the share of SAEs of other seeds in which a latent recurs; NaN where it is not known. */
    recurrence(latent) {
      return this.recurs[latent] ?? NaN;
    }

    /* Return the label, or a description of a latent without one. */
    title(latent) {
      return this.labels[latent] || (this.dead(latent) ? "never fires" : "no label");
    }

    snippet(latent) {
      const [start, end] = [this.snippetOffsets[latent], this.snippetOffsets[latent + 1]];
      return { ids: this.snippets.subarray(start, end), peak: this.snippetPeaks[latent] };
    }

    /* Return the snippet as tokens with their texts. */
    spelled(latent) {
      return jsae.tokens.spell(this.snippet(latent).ids, { before: true, after: true });
    }

    /* Return the tokens that the latent raises, most first. */
    raised(latent) {
      return this.logits.subarray(latent * this.perLatent, (latent + 1) * this.perLatent);
    }

    /* Return the tokens on which the latent is strongest in its strongest texts. */
    strongest(latent) {
      return this.peaks.subarray(this.peakOffsets[latent], this.peakOffsets[latent + 1]);
    }

    /* Return all texts by which the search finds a latent, in lower case. */
    haystack(latent) {
      if (this.haystacks[latent] === undefined) {
        const words = (ids) => Array.from(ids, (id) => jsae.tokens.word(id)).join("\n");
        const text = this.spelled(latent).map((token) => token.text).join("");
        this.haystacks[latent] = [
          `#${latent}`, this.labels[latent], this.notes.get(latent) ?? "", words(this.strongest(latent)), text, words(this.raised(latent)),
        ].join("\n").toLowerCase();
      }
      return this.haystacks[latent];
    }

    /* Set a person's label and note; the label "" restores the automatic one. */
    name({ latent, label, note }) {
      if (latent >= this.size) return;
      if (!this.byPerson.has(latent)) this.automatic.set(latent, [this.labels[latent], this.f1[latent]]);
      const [old, f1] = this.automatic.get(latent) ?? ["", NaN];
      this.labels[latent] = label || old;
      this.f1[latent] = label ? NaN : f1;
      if (label) this.byPerson.add(latent);
      else this.byPerson.delete(latent);
      if (note) this.notes.set(latent, note);
      else this.notes.delete(latent);
      this.haystacks[latent] = undefined;
    }
  }

  /* Load the details of one latent, with the tokens of its examples. */
  data.latent = async (hook, latent) => {
    const list = await data.list(hook);
    const size = data.manifest.shard;
    const shard = await opened(`shard-${hook}-${Math.floor(latent / size)}`);
    const at = latent - shard.first;
    const examples = [];
    for (let e = shard.examples[at]; e < shard.examples[at + 1]; e++) examples.push(example(shard, e, list.max[latent]));
    await Promise.all(examples.map(async (one) => Object.assign(one, await window_(one.row, one.position))));
    const row = (name) => shard[name].subarray(at * shard[name].length / shard.size, (at + 1) * shard[name].length / shard.size);
    const pairs = (ids, values) => Array.from(row(ids), (id, i) => ({ id, value: row(values)[i] }))
      .filter((pair) => Number.isFinite(pair.value));
    return {
      latent, list, examples,
      hist: row("hist"), histRange: row("hist_range"), shares: row("group_share"),
      logitHist: row("logit_hist"), logitRange: row("logit_range"),
      top: pairs("top_logits", "top_logit_values"), bottom: pairs("bottom_logits", "bottom_logit_values"),
      neighbours: pairs("neighbours", "neighbour_cosines"), together: pairs("together", "together_share"),
      decoder: row("decoder"), across: await across(hook, latent), through: await through(hook, latent), origin: await origin(hook, latent),
    };
  };

  /* Return the latents of the other run that write most alike, with their cosines; null where none is compared. */
  async function across(hook, latent) {
    if (!data.manifest.hooks[hook].across) return null;
    if (!nearest.has(hook)) {
      nearest.set(hook, load(`across-${hook}`).then((file) => (
        { hook: file.hook, ids: column(file.ids, Uint32Array), cosines: column(file.cosines, Float32Array) })));
    }
    const [table, list] = [await nearest.get(hook), await data.list(data.manifest.hooks[hook].across.hook)];
    const each = table.ids.length / data.manifest.hooks[hook].d_sae;
    const pairs = Array.from(table.ids.subarray(latent * each, (latent + 1) * each), (id, i) => ({ id, value: table.cosines[latent * each + i] }));
    return { list, pairs };
  }

  /* Return what a latent writes through later layers, by the Jacobian lens of its run; null where there is none. */
  async function through(hook, latent) {
    const { through: has, d_sae: size } = data.manifest.hooks[hook];
    if (!has) return null;
    if (!written.has(hook)) written.set(hook, load(`through-${hook}`));
    const file = await written.get(hook);
    const pairs = (ids, values) => {
      const all = [column(file[ids], Uint16Array), column(file[values], Float32Array)];
      const each = all[0].length / size;
      return Array.from({ length: each }, (_, i) => ({ id: all[0][latent * each + i], value: all[1][latent * each + i] }));
    };
    return { ...file, top: pairs("top", "top_values"), bottom: pairs("bottom", "bottom_values") };
  }

  /* Return where a latent comes from; null where it was not traced. */
  async function origin(hook, latent) {
    if (!data.manifest.hooks[hook].origins.includes(latent)) return null;
    if (!traced.has(hook)) traced.set(hook, load(`origins-${hook}`));
    return (await traced.get(hook))[latent];
  }

  /* Return the cosine of two decoder rows of one width; NaN where one is not known. */
  data.cosine = (a, b) => {
    const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
    return a.length && a.length === b.length ? dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)) : NaN;
  };

  const SHARD_COLUMNS = {
    hist: Uint32Array, hist_range: Float32Array, group_share: Float32Array, logit_hist: Uint32Array,
    logit_range: Float32Array, top_logits: Uint16Array, bottom_logits: Uint16Array, top_logit_values: Float32Array,
    bottom_logit_values: Float32Array, neighbours: Uint32Array, together: Uint32Array, neighbour_cosines: Float32Array,
    together_share: Float32Array, examples: Uint32Array, group: Uint8Array, row: Uint32Array, position: Uint16Array,
    value: Float32Array, activations: Uint32Array, activation_position: Uint16Array, activation_share: Uint16Array,
    decoder: Int8Array,
  };
  const shards = new Map();

  async function opened(name) {
    if (!shards.has(name)) {
      const file = await load(name);
      const columns = Object.entries(SHARD_COLUMNS).map(([key, Type]) => [key, column(file[key], Type)]);
      const shard = { first: file.first, ...Object.fromEntries(columns) };
      shards.set(name, { ...shard, size: shard.examples.length - 1 });
    }
    return shards.get(name);
  }

  function example(shard, e, max) {
    const values = new Map();
    for (let a = shard.activations[e]; a < shard.activations[e + 1]; a++) {
      values.set(shard.activation_position[a], shard.activation_share[a] / 65535 * max);
    }
    return { group: shard.group[e], row: shard.row[e], position: shard.position[e], value: shard.value[e], values };
  }

  /* Load the tokens around a position of a row, as many as the page holds. */
  async function window_(row, position) {
    const { row_length: length, radius, texts: cuts } = data.manifest;
    const from = Math.max(position - radius, 0);
    const to = Math.min(position + radius + 1, length);
    const file = await text(last(cuts, row * length + from));
    const run = last(file.starts, row * length + from);
    const start = file.offsets[run] + row * length + from - file.starts[run];
    return { from, ids: file.tokens.subarray(start, start + to - from), cut: { before: from > 0, after: to < length } };
  }

  function text(number) {
    if (!texts.has(number)) {
      texts.set(number, load(`texts-${number}`).then((file) => ({
        starts: column(file.starts, Uint32Array), offsets: offsets(column(file.lengths, Uint32Array)),
        tokens: column(file.tokens, Uint16Array),
      })));
    }
    return texts.get(number);
  }

  /* Return the index of the last of ascending numbers that is not above `value`. */
  function last(rising, value) {
    let [low, high] = [0, rising.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (rising[middle] <= value) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  jsae.data = data;
})();
