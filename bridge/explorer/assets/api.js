/* The server behind the page, where there is one: what it can do, and how it is asked. */
"use strict";

(() => {
  /* Asks the server; what it refuses comes as an Error with its words. */
  async function ask(path, body, signal) {
    const told = body === undefined ? { signal } : {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
    };
    let answer;
    try {
      answer = await fetch(`api/${path}`, told);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the server does not answer: is it still running?");
    }
    if (!answer.ok) {
      const refused = await answer.json().catch(() => ({}));
      throw new Error(refused.error ?? `the server answers ${answer.status}`);
    }
    return answer;
  }

  /* Lines of JSON as they come. */
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
      reader.cancel().catch(() => {}); // a connection that broke has nothing left to cancel
    }
  }

  /* Asks again and again, the last question only: `answer` sees no reply to an earlier one. */
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

  /* Finds out whether a server stands behind the page. A page from the disk has none. */
  jsae.connect = async () => {
    if (!location.protocol.startsWith("http")) return;
    try {
      const info = await (await ask("info")).json();
      if (info.live !== true) return;
      jsae.live = info;
    } catch {
      return; // the same files on a server of plain files
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
    note: async (line) => (await ask("notes", line)).json(),
  };
})();
