/* Requests to the server of the page, if there is one. */
"use strict";

(() => {
  /* Send a request; a refusal throws an Error with the server's message. */
  async function ask(path, body, signal) {
    const options = body === undefined ? { signal } : {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
    };
    let answer;
    try {
      answer = await fetch(`api/${path}`, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the server does not answer: is it still running?");
    }
    if (!answer.ok) {
      const refusal = await answer.json().catch(() => ({}));
      throw new Error(refusal.error ?? `the server answers ${answer.status}`);
    }
    return answer;
  }

  /* Yield lines of JSON as they arrive. */
  async function* lines(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        const parts = (rest + (value ?? "")).split("\n");
        rest = done ? "" : parts.pop();
        for (const part of parts) if (part) yield JSON.parse(part);
        if (done) return;
      }
    } finally {
      reader.cancel().catch(() => {}); // a broken connection has nothing to cancel
    }
  }

  /* Return a function that sends a request and aborts the previous one: `answer` sees only the reply to the latest. */
  function latest(path, answer, failed) {
    let running = null;
    return async (body) => {
      running?.abort();
      const mine = new AbortController();
      running = mine;
      try {
        const reply = await (await ask(path, body, mine.signal)).json();
        if (running === mine) answer(reply);
      } catch (error) {
        if (error.name !== "AbortError" && running === mine) failed(error);
      }
    };
  }

  /* Find out whether the page has a server. A page from disk has none. */
  jsae.connect = async () => {
    if (!location.protocol.startsWith("http")) return;
    try {
      const info = await (await ask("info")).json();
      if (info.live !== true) return;
      jsae.live = info;
    } catch {
      return; // a server of static files
    }
    try {
      jsae.data.notes = (await (await ask("notes")).json()).notes;
    } catch (error) {
      jsae.toast(error.message, true);
    }
  };

  jsae.api = {
    lines, latest,
    steer: (request, signal) => ask("steer", request, signal),
    graph: async (request) => (await ask("graph", request)).json(),
    note: async (line) => (await ask("notes", line)).json(),
  };
})();
