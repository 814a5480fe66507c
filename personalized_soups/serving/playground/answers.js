// One column of the page: its source, the answer as it streams, its speed and its scores.

import { loadScores, streamAnswer } from "./api.js";

const EMPTY = {
  base: "The base model alone will answer here.",
  mixture: "Your mixture will answer here, and again whenever a slider settles.",
  user: "This saved profile will answer here.",
};

export class Column {
  #root;
  #running = null; // the AbortController of the running request
  #retry = () => {};
  #hasAnswer = false;

  constructor(place, label, { onSource, onState }) {
    this.#root = document.getElementById("column").content.cloneNode(true).firstElementChild;
    this.label = label;
    this.onState = onState;
    this.#root.setAttribute("aria-label", label);
    this.#part("label span").textContent = `${label} comes from`;
    this.select = this.#part("select");
    this.select.addEventListener("change", () => onSource(this));
    this.#part(".fault button").addEventListener("click", () => {
      this.select.focus(); // the button goes away
      this.#retry();
    });
    place.append(this.#root);
  }

  #part(selector) {
    return this.#root.querySelector(selector);
  }

  get source() {
    return this.select.value;
  }

  get isRunning() {
    return this.#running !== null;
  }

  describe(text) {
    this.#part(".mixture").textContent = text;
  }

  /** Show a description of the source until there is an answer. */
  invite() {
    if (this.#hasAnswer || this.isRunning) return;
    this.#part(".answer p").textContent = EMPTY[this.source.split(":")[0]];
    this.#root.dataset.state = "empty";
  }

  stop() {
    this.#running?.abort();
  }

  /** Stream one answer, and abort the running one. */
  async answer(request, prompt, { isScored, retry, onRefusedKey }) {
    this.stop();
    const running = new AbortController();
    const { signal } = running;
    this.#running = running;
    this.#retry = retry;
    this.#begin();
    const run = new Run(performance.now());
    try {
      for await (const chunk of streamAnswer(request, signal)) {
        if (signal.aborted) break;
        this.#take(run, chunk);
      }
      if (!signal.aborted) this.#end(run, request.max_tokens);
    } catch (error) {
      if (this.#running === running) this.#fail(run, error, onRefusedKey);
    } finally {
      if (this.#running === running) {
        if (signal.aborted) this.#stopped(run);
        this.#running = null;
        this.#part(".answer").setAttribute("aria-busy", "false");
        this.#part(".answer").style.minHeight = "";
        this.onState();
      }
    }
    if (isScored && run.isWhole && run.text && !signal.aborted && this.#running === null) {
      await this.#score(prompt, run.text, running);
    }
  }

  #begin() {
    const answer = this.#part(".answer");
    // The old answer stays, dimmed, until the first word of the new one arrives, so that the page does not jump.
    answer.style.minHeight = `${answer.clientHeight}px`;
    answer.setAttribute("aria-busy", "true");
    if (!this.#hasAnswer) this.#part(".answer p").textContent = "";
    this.#root.dataset.state = "waiting";
    this.#part(".fault").hidden = true;
    this.#part(".figures").textContent = "";
    this.#part(".scores").hidden = true;
    this.#part("[role=status]").textContent = "";
    this.onState();
  }

  #take(run, chunk) {
    const choice = chunk.choices?.[0];
    if (chunk.usage) run.numTokens = chunk.usage.completion_tokens;
    if (choice?.finish_reason) run.finish = choice.finish_reason;
    const text = choice?.delta?.content;
    if (!text) return;
    const now = performance.now();
    if (run.first === null) {
      run.first = now;
      this.#part(".answer p").textContent = "";
      this.#root.dataset.state = "streaming";
    }
    run.last = now;
    run.text += text;
    this.#part(".answer p").append(text); // a text node: markup in the answer stays text
    this.#hasAnswer = true;
  }

  #end(run, maxTokens) {
    run.isWhole = true;
    this.#hasAnswer = true;
    this.#root.dataset.state = run.text ? "done" : "empty";
    if (!run.text) this.#part(".answer p").textContent = "An empty answer: the model ended at once.";
    const parts = run.figures();
    if (run.finish === "length") parts.push(`cut at ${maxTokens} tokens`);
    this.#part(".figures").textContent = parts.join(" · ");
    this.#part("[role=status]").textContent = `${this.label} is done. ${run.text || "It is empty."}`;
  }

  #stopped(run) {
    this.#root.dataset.state = run.text ? "done" : "empty";
    if (!run.text) this.#part(".answer p").textContent = "Stopped before the first word.";
    this.#hasAnswer ||= run.text !== "";
    this.#part(".figures").textContent = [...run.figures(), "stopped"].join(" · ");
  }

  #fail(run, error, onRefusedKey) {
    if (error.name === "AbortError") return;
    if (error.status === 401) onRefusedKey(error);
    if (!run.text) this.#part(".answer p").textContent = "";
    this.#hasAnswer = run.text !== "";
    this.#root.dataset.state = "failed";
    this.#part(".fault").hidden = false;
    const message = error.status === 429 ? busyText(error.retryAfter) : error.message;
    this.#part(".fault p").textContent = message;
    this.#part("[role=status]").textContent = `${this.label} failed. ${message}`;
  }

  async #score(prompt, text, running) {
    let rows;
    try {
      rows = await loadScores(prompt, text, running.signal);
    } catch {
      return; // scores are optional
    }
    if (this.#running !== null || running.signal.aborted) return;
    const list = this.#part(".scores");
    list.replaceChildren(...rows.map(scoreRow));
    list.setAttribute("aria-label", `Scores of ${this.label.toLowerCase()}`);
    list.hidden = rows.length === 0;
  }
}

/** The state of one answer while it streams. */
class Run {
  text = "";
  finish = null;
  first = null;
  last = null;
  numTokens = null;
  isWhole = false;

  constructor(start) {
    this.start = start;
  }

  figures() {
    const parts = [];
    if (this.numTokens !== null) parts.push(`${this.numTokens} token${this.numTokens === 1 ? "" : "s"}`);
    if (this.numTokens > 1 && this.last > this.first) {
      const speed = ((this.numTokens - 1) * 1000) / (this.last - this.first);
      parts.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`);
    }
    if (this.first !== null) parts.push(`first after ${((this.first - this.start) / 1000).toFixed(2)} s`);
    return parts;
  }
}

function scoreRow({ dimension, low, high, value, is_valid: isValid }) {
  const row = document.getElementById("score").content.cloneNode(true).firstElementChild;
  const part = (selector) => row.querySelector(selector);
  const share = Math.max(0, Math.min(1, value));
  part(".low").textContent = low;
  part(".high").textContent = high;
  row.dataset.side = !isValid ? "invalid" : share < 0.5 ? "low" : share > 0.5 ? "high" : "";
  if (isValid) {
    row.style.setProperty("--from", Math.min(0.5, share));
    row.style.setProperty("--to", Math.max(0.5, share));
    row.style.setProperty("--at", share);
    part(".value").textContent = value.toFixed(2);
    const label = document.createElement("span");
    label.className = "hidden";
    label.textContent = `, ${dimension}, from 0 (${low}) to 1 (${high})`;
    part(".value").append(label);
  } else {
    part(".value").textContent = "not a valid answer";
  }
  return row;
}

function busyText(seconds) {
  const wait = seconds === null ? "a moment" : `${seconds} second${seconds === 1 ? "" : "s"}`;
  return `The server is busy just now. Please try again in ${wait}.`;
}
