/* The address holds what was typed and chosen, so that a reload or a shared link shows it again. */
"use strict";

(() => {
  const PAUSE = 250; // milliseconds: browsers limit how often an address may change
  const pending = new Map();

  const asked = () => new URLSearchParams(location.hash.slice(1));

  const write = jsae.later(() => {
    if (!pending.size) return;
    const values = asked();
    for (const [name, value] of pending) {
      values.delete(name);
      for (const one of [value].flat()) if (one !== "" && one !== null && one !== undefined) values.append(name, one);
    }
    pending.clear();
    const hash = values.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }, PAUSE);

  /* Set parameters of the address without a new entry in the history. A list sets one parameter for each of its
     values; "" and null remove a parameter. */
  function keep(changes) {
    for (const [name, value] of Object.entries(changes)) pending.set(name, value);
    write();
  }

  /* Forget changes that belong to the former view. */
  const forget = () => pending.clear();

  /* Return a parameter as one of the allowed values, else null. */
  function oneOf(values, name, allowed) {
    const value = values.get(name);
    return allowed.includes(value) ? value : null;
  }

  /* Return a parameter as a number within bounds, else null. */
  function within(values, name, low, high) {
    const value = Number(values.get(name) || NaN);
    return value >= low && value <= high ? value : null;
  }

  jsae.address = { asked, keep, forget, oneOf, within };
})();
