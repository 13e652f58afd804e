/* Steering: the features to push, and the model's continuations with and without them, side by side. */
"use strict";

(() => {
  const { el, number, segmented } = jsae;
  const SIDES = [["default", "Default"], ["steered", "Steered"]];
  const ENDS = { length: "reached the token limit", stop: "ended", time: "ran out of time" };
  const MODES = {
    additive: "adds strength times the direction", orthogonal: "multiplies the component along the direction",
    projection_cap: "caps the component along the direction", clamp: "sets the activation", scale: "multiplies the activation", ablate: "removes the feature",
  };
  const GENTLE = 2; // times the mean activation
  const LONGEST_PART = 8; // tokens of a repeated part
  const REPEATS = 4; // consecutive repetitions at the end of a text that count as repeating
  const FEWEST_REPEATED = 8; // tokens of all repetitions together
  const USUAL = { temperature: 0.5, max_tokens: 64, seed: 16, strength_multiplier: 1 };
  const state = { pushed: [], prompt: "", chat: false, talk: [], follow: "steered", directionsOf: null, settings: { ...USUAL } };
  const keep = () => jsae.address.keep(jsae.steerlink.parameters(state, USUAL));
  let running = null;
  let parts = {};

  /* ---- the request ---- */

  const mode = (name) => jsae.live.modes.find((one) => one.name === name);
  const factor = (name) => mode(name).neutral === 1;

  /* Add a latent to the pushed features, with a gentle strength, and show them. */
  function add(list, latent) {
    const most = jsae.live.limits.features;
    if (state.pushed.length >= most) {
      jsae.toast(`at most ${most} features are pushed at once`, true);
      return;
    }
    const name = mode("clamp") ? "clamp" : jsae.live.modes[0].name;
    state.pushed.push({ list, latent, mode: name, strength: usual(list, latent, name), positions: jsae.live.positions[0] });
    if (parts.pushed?.isConnected) drawPushed();
    else location.hash = "#view=steer";
  }

  /* Return the initial strength: a multiple of the latent's mean activation, below the largest one, at which most
     latents make the model repeat itself. It is rounded towards zero to three digits. */
  function usual(list, latent, name) {
    if (factor(name)) return 2;
    const strength = Math.min(GENTLE * list.mean[latent], list.max[latent]) || 1;
    const digit = 10 ** (Math.floor(Math.log10(Math.abs(strength))) - 2);
    return Number((Math.trunc(strength / digit) * digit).toPrecision(3));
  }

  const reach = (one) => (factor(one.mode) ? 6 : Math.max(10, Math.ceil(3 * one.list.max[one.latent])));

  function request(messages) {
    const steer = state.pushed.map(({ list, latent, mode: name, strength, positions }) =>
      ({ hook: list.info.hook, index: latent, mode: name, strength, positions }));
    const from = state.directionsOf && { directions_of: state.directionsOf };
    return { ...from, ...(messages ? { messages } : { prompt: state.prompt }), steer, ...state.settings };
  }

  /* ---- the page ---- */

  async function show(main, list, asked, still) {
    await jsae.steerlink.restore(state, asked, USUAL);
    if (!still()) return;
    const { limits, model } = jsae.live;
    state.settings.max_tokens = Math.min(state.settings.max_tokens, limits.max_tokens);
    parts = {
      pushed: el("div", { class: "pushed" }), answers: parts.answers ?? el("div", { class: "answers" }),
      prompt: el("textarea", {
        id: "prompt", rows: 4, "aria-label": "Prompt", spellcheck: "false", value: state.prompt,
        on: { input: (event) => {
          state.prompt = event.target.value;
          keep();
        }, keydown: (event) => {
          if (event.key === "Enter" && (event.ctrlKey || event.metaKey || state.chat) && !event.shiftKey) {
            event.preventDefault();
            go();
          }
        } },
      }),
      go: el("button", { type: "button", class: "plain strong", id: "go", on: { click: go } }, "Write"),
      base: el("p", { class: "repeats small", role: "status" }, "This checkpoint was not trained to chat, as far as its path says: answers may be mere continuations."),
      stop: el("button", { type: "button", class: "plain", id: "stop", disabled: running === null, on: { click: stop } }, "Stop"),
    };
    main.replaceChildren(el("div", { class: "page steer" },
      el("header", { class: "title" }, el("h1", {}, "Push features, read the continuation"),
        el("p", { class: "quiet" }, `${jsae.data.manifest.model} continues the same text with the same seed, with and without the pushed features.`)),
      el("div", { class: "desk" }, el("div", { class: "controls" },
        el("section", { class: "card" }, el("h2", {}, "Features"), parts.pushed, finder(list), directions()),
        el("section", { class: "card settings" }, el("h2", {}, "Sampling"),
          setting("temperature", "Temperature", 0, 2, 0.1), setting("max_tokens", "Tokens", 1, limits.max_tokens, 1),
          setting("seed", "Seed", 0, 999999, 1), setting("strength_multiplier", "Strength ×", 0, 10, 0.1))),
      el("div", { class: "paper" }, el("section", { class: "card ask" },
        model.chat && segmented("Continue a text, or chat", [["text", "Continue"], ["chat", "Chat"]], state.chat ? "chat" : "text", (kind) => {
          state.chat = kind === "chat";
          keep();
          stop();
          talkAnew();
        }), parts.base, parts.prompt, el("div", { class: "line" }, parts.go, parts.stop, el("span", { class: "grow" }),
          el("span", { class: "quiet small" }, `at most ${limits.prompt_tokens} tokens of prompt`))), parts.answers))));
    drawPushed();
    if (parts.answers.children.length) said(state.chat);
    else talkAnew();
  }

  /* Return the choice of the checkpoint whose directions are pushed; null for a run on one. */
  function directions() {
    const { checkpoints, checkpoint } = jsae.live;
    if (!checkpoints?.length) return null;
    return el("label", { class: "field directions", title: "The features' directions and encoders as they are in this checkpoint" }, "As in checkpoint", el("select", {
      id: "directions", on: { change: (event) => {
        state.directionsOf = event.target.value;
        keep();
      } },
    }, checkpoints.map((name) => el("option", { value: name, selected: name === (state.directionsOf ?? checkpoint) }, name))));
  }

  /* Set the texts of the prompt's controls. */
  function said(chat) {
    parts.prompt.placeholder = chat ? "Your message" : "Text to continue";
    parts.go.textContent = chat ? "Send" : "Write";
    parts.base.hidden = !chat || jsae.live.model.trained_to_chat;
  }

  function setting(key, name, min, max, step) {
    return el("label", { class: "field" }, name, el("input", {
      type: "number", id: `set-${key}`, min, max, step, value: state.settings[key], on: { change: (event) => {
        const value = Number(event.target.value);
        state.settings[key] = Math.min(max, Math.max(min, step === 1 ? Math.round(value) : value));
        event.target.value = state.settings[key];
        keep();
      } },
    }));
  }

  function drawPushed() {
    const none = el("p", { class: "quiet small" }, "None yet: find one below, or choose “Steer with it” on its page.");
    parts.pushed.replaceChildren(...(state.pushed.length ? state.pushed.map(push) : [none]));
    keep();
  }

  /* Draw one pushed feature: latent, mode, strength and positions. */
  function push(one) {
    const { needs_strength: strong } = mode(one.mode);
    const choice = (name, options, chosen, act) => el("select", { "aria-label": `${name} of #${one.latent}`, on: { change: (event) => act(event.target.value) } },
      options.map((option) => el("option", { value: option, selected: option === chosen, title: MODES[option] ?? "" }, option.replace("_", " "))));
    return el("div", { class: `push ${jsae.strength.colour(state.pushed.indexOf(one))}`, "data-latent": one.latent }, el("div", { class: "line" }, jsae.latentLink(one.list, one.latent),
      el("button", { type: "button", class: "icon", "aria-label": `Remove #${one.latent}`, title: "Remove it", on: { click: () => {
        state.pushed.splice(state.pushed.indexOf(one), 1);
        drawPushed();
      } } }, "×")),
    el("div", { class: "line" }, choice("Mode", jsae.live.modes.map(({ name }) => name), one.mode, (name) => {
      if (factor(name) !== factor(one.mode)) one.strength = usual(one.list, one.latent, name);
      one.mode = name;
      drawPushed();
      parts.pushed.children[state.pushed.indexOf(one)].querySelector("select").focus();
    }), choice("Tokens", jsae.live.positions, one.positions, (positions) => {
      one.positions = positions;
      keep();
    })),
    strong && jsae.strength.controls(one, factor(one.mode), reach(one), keep),
    el("p", { class: "quiet small" }, MODES[one.mode] ?? "", jsae.data.manifest.hooks.length > 1 && ` · ${one.list.info.hook}`));
  }

  /* Return a search box for latents to push. */
  function finder(list) {
    const results = el("ul", { class: "found", "aria-label": "Latents found", hidden: true });
    const choose = (latent) => {
      box.value = "";
      results.hidden = true;
      add(list, latent);
    };
    const look = () => {
      const query = box.value.trim();
      const order = query ? jsae.list.find(list, { ...jsae.list.fresh(), query }) : [];
      results.replaceChildren(...order.slice(0, 6).map((latent) => el("li", {},
        el("button", { type: "button", on: { click: () => choose(latent) } }, el("span", { class: "id" }, `#${latent}`), " ", jsae.tokens.shown(list.title(latent))))));
      results.hidden = !results.children.length;
    };
    const box = el("input", {
      type: "search", id: "find", placeholder: "Add a feature: label, token, number", "aria-label": "Find a feature to push", autocomplete: "off",
      on: { input: jsae.later(look, 80), keydown: (event) => {
        if (event.key !== "Enter") return;
        look();
        results.querySelector("button")?.click();
      } },
    });
    return el("div", { class: "finder" }, box, results);
  }

  /* ---- the continuations ---- */

  function talkAnew() {
    state.talk = [];
    said(state.chat);
    const rest = el("p", { class: "quiet rest" }, state.chat ? "Both answers appear here; the conversation continues from the one you choose." : "Both continuations appear here, token by token.");
    parts.answers.replaceChildren(rest);
  }

  function stop() {
    running?.abort();
  }

  /* Request both continuations and show them as they arrive. */
  async function go() {
    if (!state.prompt.trim()) {
      parts.prompt.focus();
      return;
    }
    stop();
    const mine = new AbortController();
    running = mine;
    const prompt = state.prompt;
    const messages = state.chat ? [...history(), { role: "user", content: prompt }] : null;
    const pages = state.pushed.length ? SIDES : SIDES.slice(0, 1);
    const sheets = Object.fromEntries(pages.map(([which, name]) => [which, sheet(name, state.chat ? "" : prompt)]));
    const turn = el("div", { class: "turn" }, state.chat && el("p", { class: "said" }, jsae.tokens.shown(prompt)),
      el("div", { class: "sheets" }, Object.values(sheets).map(({ node }) => node)));
    if (state.chat && state.talk.length) parts.answers.append(turn);
    else parts.answers.replaceChildren(turn);
    parts.stop.disabled = false;
    try {
      for await (const line of jsae.api.lines(await jsae.api.steer(request(messages), mine.signal))) take(sheets, line);
      if (messages) remember(prompt, sheets, turn);
    } catch (error) {
      const stopped = error.name === "AbortError";
      for (const one of Object.values(sheets)) one.finish(stopped ? "stopped" : error.message, !stopped);
    } finally {
      if (running === mine) {
        running = null;
        parts.stop.disabled = true;
      }
    }
  }

  function take(sheets, line) {
    if (line.error) throw new Error(line.error);
    const one = sheets[line.which];
    if (line.end) one?.finish(ENDS[line.end] ?? line.end);
    else if (line.which) one?.write(line);
  }

  /* Return the sheet of a continuation; the more a pushed feature fires on a token, the
     brighter it is, in the colour of the one that fires most. */
  function sheet(name, before) {
    const text = jsae.tokens.walk(el("div", { class: "text" }, before && el("span", { class: "before" }, jsae.tokens.shown(before))), `${name} continuation`);
    const end = el("small", { class: "writing" }, "writing …");
    const warning = el("p", { class: "repeats small", role: "status", hidden: true });
    const ids = [];
    const pushed = [...state.pushed];
    const output = { name, text: "" };
    return {
      output,
      node: el("section", { class: "card sheet", "data-which": name.toLowerCase() }, el("h2", {}, name, end), warning, text),
      write(line) {
        output.text += line.text;
        const features = line.features ?? {};
        const shares = pushed.map(({ list, latent }) => {
          const value = features[list.info.hook]?.find((one) => one.index === latent)?.value ?? 0;
          return list.max[latent] ? value / list.max[latent] : 0;
        });
        const share = Math.max(0, ...shares);
        const shown = jsae.tokens.span({ id: line.id, text: line.text }, { heat: share, tip: () => hover(line, features) });
        if (share > 0) shown.classList.add(jsae.strength.colour(shares.indexOf(share)));
        shown.textContent = jsae.tokens.shown(line.text);
        text.append(shown);
        ids.push(line.id);
        warn(warning, ids, name === "Steered");
      },
      finish(why, bad = false) {
        if (end.className !== "writing") return; // it has ended already
        end.className = bad ? "bad" : "";
        end.textContent = why;
      },
    };
  }

  /* Warn when the end of a continuation repeats itself, and advise. */
  function warn(box, ids, steered) {
    if (!box.hidden) return;
    const length = period(ids);
    if (!length) return;
    const part = ids.slice(-length).map((id) => jsae.tokens.word(id)).join("");
    box.replaceChildren("It repeats itself: ", el("code", { class: "chip" }, jsae.tokens.line(part)),
      steered ? " – try a smaller strength." : " – even without steering: try another prompt or a higher temperature.");
    box.hidden = false;
  }

  /* Return the length in tokens of the part that the end of a text repeats; 0 if there is none. */
  function period(ids) {
    for (let length = 1; length <= LONGEST_PART; length++) {
      const tail = ids.slice(-Math.max(REPEATS * length, FEWEST_REPEATED));
      if (tail.length < Math.max(REPEATS * length, FEWEST_REPEATED)) return 0;
      if (tail.every((id, i) => i < length || id === tail[i - length])) return length;
    }
    return 0;
  }

  function hover(line, features) {
    const { info, labels } = jsae.list.current;
    const strongest = Object.entries(features).flatMap(([hook, some]) => some.slice(0, 4).map(({ index, value }) =>
      [`#${index} ${hook === info.hook ? labels[index].slice(0, 28) : hook}`, number(value)]));
    return [["", jsae.tokens.quoted(line.text)], ...strongest, ["token", line.id]];
  }

  /* ---- conversations ---- */

  /* Return the conversation so far, with the answers of the chosen side. */
  const history = () => state.talk.flatMap(({ said, answers }) =>
    [{ role: "user", content: said }, { role: "assistant", content: answers[state.follow] ?? answers.default }]);

  function remember(said, sheets, turn) {
    state.talk.push({ said, answers: Object.fromEntries(Object.entries(sheets).map(([which, { output }]) => [which, output.text])) });
    state.prompt = "";
    parts.prompt.value = "";
    keep();
    parts.answers.querySelector(".follow")?.remove();
    turn.append(el("div", { class: "line follow" }, el("span", { class: "quiet small" }, "Continue from"),
      segmented("Conversation to continue", SIDES, state.follow, (side) => { state.follow = side; }),
      el("button", { type: "button", class: "plain", on: { click: talkAnew } }, "Start over")));
  }

  jsae.steer = { show, add, stop, period };
})();
