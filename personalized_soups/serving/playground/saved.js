// The saved profiles: search, list versions, use, restore, delete.

import { deleteProfile, findProfiles, loadVersions, saveProfile } from "./api.js";
import { isPlain, mixtureText } from "./profile.js";

const PAGE = 10; // profiles per page
const MOST_VERSIONS = 50; // the newest versions; `psoups profile history` prints all
const PAUSE_MS = 250; // after a key press in the search field

const id = (name) => document.getElementById(name);
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

export class SavedProfiles {
  #on;
  #request = null; // the AbortController of the running request
  #typing = 0;

  /**
   * `on.use(user, profile, version)` moves the sliders and returns whether they equal the profile; version is null for
   * the current one. `on.changed(user, profile)` is called with a new version, or with null after a deletion;
   * `on.refusedKey` is called for a 401.
   */
  constructor(on) {
    this.#on = on;
    id("find").addEventListener("input", () => {
      clearTimeout(this.#typing);
      this.#typing = setTimeout(() => this.list(), PAUSE_MS);
    });
    id("find").addEventListener("search", () => this.list()); // Enter, or the field's clear button
    id("more").addEventListener("click", () => this.list(id("found").lastElementChild?.dataset.user));
  }

  /** List the profiles that match the search; `after` continues the list after a name. */
  async list(after = "") {
    clearTimeout(this.#typing);
    this.#request?.abort();
    const request = new AbortController();
    this.#request = request;
    const search = id("find").value.trim();
    let page;
    try {
      page = await findProfiles({ search, after, limit: PAGE }, request.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error, id("found-note"));
      return;
    }
    if (request !== this.#request) return;
    const rows = page.data.map((stored) => this.#row(stored));
    if (after) id("found").append(...rows);
    else id("found").replaceChildren(...rows);
    id("more").hidden = !page.has_more;
    if (after) rows[0]?.querySelector("summary").focus();
    this.#count(search);
  }

  #count(search) {
    const number = id("found").children.length;
    const none = search ? `No name contains “${search}”.` : "None yet.";
    const more = id("more").hidden ? "" : " are listed, and there are more";
    say(id("found-note"), number ? `${counted(number, "profile")}${more}` : none);
  }

  #fail(error, note) {
    if (error.status === 401) this.#on.refusedKey(error);
    say(note, error.message, true);
  }

  #row({ user, version }) {
    const row = document.getElementById("saved-row").content.cloneNode(true).firstElementChild;
    const part = (selector) => row.querySelector(selector);
    const note = part("[role=status]");
    const state = { user, version, row, note };
    row.dataset.user = user;
    part(".user").textContent = user;
    part(".delete").setAttribute("aria-label", `Delete ${user}`);
    showVersion(state);
    part("details").addEventListener("toggle", () => {
      if (part("details").open) this.#open(state);
    });
    part(".delete").addEventListener("click", () => {
      part(".confirm p").textContent = `Delete “${user}” with all its versions? There is no way back.`;
      part(".confirm").hidden = false;
      part(".no").focus();
    });
    part(".no").addEventListener("click", () => {
      part(".confirm").hidden = true;
      part(".delete").focus();
    });
    part(".yes").addEventListener("click", () => this.#delete(state));
    return row;
  }

  async #open(state) {
    const { user, row, note } = state;
    say(note, "Reading the versions …");
    let versions;
    try {
      versions = (await loadVersions(user)).reverse();
    } catch (error) {
      return this.#fail(error, note);
    }
    state.version = versions[0].version;
    showVersion(state);
    const shown = versions.slice(0, MOST_VERSIONS);
    row.querySelector(".versions").replaceChildren(...shown.map((stored) => this.#version(state, stored)));
    say(note, shown.length < versions.length ? `The newest ${shown.length} of ${versions.length} versions.` : "");
    return undefined;
  }

  #version(state, { version, written_at: writtenAt, profile }) {
    const item = document.getElementById("version").content.cloneNode(true).firstElementChild;
    const part = (selector) => item.querySelector(selector);
    const { user, note } = state;
    const isCurrent = version === state.version;
    const time = new Date(writtenAt).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    part("b").textContent = `Version ${version}`;
    part("b + span").textContent = isCurrent ? `current · ${time}` : time;
    part("p + p").textContent = profileMixture(profile);
    part(".use").setAttribute("aria-label", `Use version ${version} of ${user}`);
    part(".use").addEventListener("click", () => {
      const isExact = this.#on.use(user, profile, isCurrent ? null : version);
      const near = "The sliders are near it, and cannot show all of it.";
      say(note, isExact ? `Version ${version} is on the sliders.` : near);
    });
    part(".restore").hidden = isCurrent;
    part(".restore").setAttribute("aria-label", `Restore version ${version} of ${user}`);
    part(".restore").addEventListener("click", () => this.#restore(state, version, profile));
    return item;
  }

  async #restore(state, version, profile) {
    const { user, row, note } = state;
    try {
      await saveProfile(user, profile, { version: state.version });
    } catch (error) {
      return this.#conflict(state, error);
    }
    this.#on.changed(user, profile);
    await this.#open(state);
    say(note, `Version ${state.version} is a copy of version ${version}.`);
    return row.querySelector(".use").focus(); // the pressed button is gone
  }

  async #delete(state) {
    const { user, row } = state;
    try {
      await deleteProfile(user, state.version);
    } catch (error) {
      if (error.status !== 404) {
        row.querySelector(".confirm").hidden = true;
        row.querySelector(".delete").focus();
        return this.#conflict(state, error);
      }
    }
    row.remove();
    id("find").focus();
    say(id("found-note"), `“${user}” is deleted.`);
    return this.#on.changed(user, null);
  }

  /** Another write came first: show the current version, and let the reader decide. */
  async #conflict(state, error) {
    if (error.status !== 412) return this.#fail(error, state.note);
    await this.#open(state);
    return say(state.note, `Nothing was done: “${state.user}” has changed meanwhile. These are its versions now.`, true);
  }
}

function showVersion({ row, version }) {
  row.querySelector("summary .quiet").textContent = `version ${version}`;
}

function say(note, text, isWrong = false) {
  note.textContent = text;
  note.classList.toggle("wrong", isWrong);
}

function profileMixture(profile) {
  const { method, normalize } = profile;
  const parts = [mixtureText(profile.weights) || "all weights 0"];
  if (!isPlain(profile)) parts.push(method && `method ${method}`, normalize === "sum" && "divided by their sum");
  return parts.filter(Boolean).join(" · ");
}
