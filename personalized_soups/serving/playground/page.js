// The page: the server's data, the sliders, and the columns that must answer again.

import { ApiError, CHAT_URL, isKeyed, loadExperts, loadProfile, loadProfiles, setKey } from "./api.js";
import { Column } from "./answers.js";
import { Sliders } from "./sliders.js";
import { startKeeping } from "./keep.js";
import { readLink, writeLink } from "./link.js";
import {
  combinationsOf, commandText, curlText, isPlain, isSameMixture, mixtureText, profileOf, profileText, requestOf, slidersOf,
} from "./profile.js";
import { SavedProfiles } from "./saved.js";
import { Taste } from "./taste.js";

const SETTLE_MS = 350; // longer than the pause between two presses of an arrow key, too short to notice
const MOST_PROFILES = 300; // more make a <select> unusable

const id = (name) => document.getElementById(name);

const server = { base: "", model: "", isScored: false, presets: [] };
const profiles = new Map(); // the saved profiles, by user
let asked = null; // the prompt that the columns answer
let settling = 0;

const sliders = new Sliders(id("sliders"), {
  onMove: () => {
    clearTimeout(settling); // no request while a slider moves
    showMixture();
  },
  onSettle: () => settle(SETTLE_MS),
});
const columns = ["Left answer", "Right answer"].map(
  (label) => new Column(id("columns"), label, { onSource: sourceChanged, onState: showRunning }),
);

// ---- the sources of the columns ----

function sourceOf(name) {
  if (name === "mixture") return { model: server.base, profile: profileOf(sliders.sliders, sliders.weights) };
  if (name.startsWith("user:")) return { model: `soup:${name.slice(5)}` };
  return { model: server.base };
}

function describe(column) {
  const name = column.source;
  if (name === "base") return column.describe(server.base);
  if (name === "mixture") return column.describe(mixtureText(sliders.weights) || "all weights 0: the same as the base");
  return column.describe(mixtureText(profiles.get(name.slice(5))?.weights ?? {}));
}

function sourceChanged(column) {
  describe(column);
  column.invite();
  remember();
  if (asked !== null) run(column);
}

// ---- requests ----

function numberIn(input) {
  const value = input.valueAsNumber;
  const inRange = Math.min(Number(input.max), Math.max(Number(input.min), value));
  const number = Number.isNaN(value) ? Number(input.defaultValue) : input.step === "1" ? Math.round(inRange) : inRange;
  if (number !== value) input.valueAsNumber = number;
  return number;
}

function sampling() {
  return { temperature: numberIn(id("temperature")), seed: numberIn(id("seed")), maxTokens: numberIn(id("max-tokens")) };
}

function run(column) {
  return column.answer(requestOf(sourceOf(column.source), asked, sampling()), asked, {
    isScored: server.isScored,
    retry: () => run(column),
    onRefusedKey: askForKey,
  });
}

function ask() {
  const prompt = id("prompt").value.trim();
  if (!prompt || !server.base) {
    id("prompt").focus();
    return;
  }
  clearTimeout(settling);
  asked = prompt;
  id("asked").textContent = prompt;
  id("asked").hidden = false;
  remember();
  columns.forEach(run);
  const { top } = id("answers").getBoundingClientRect();
  if (top > innerHeight * 0.7 || top < 0) id("answers").scrollIntoView(); // the button is far from the answers, or the screen is small
}

function settle(wait) {
  clearTimeout(settling);
  settling = setTimeout(() => {
    remember();
    if (asked !== null) columns.filter(({ source }) => source === "mixture").forEach(run);
  }, wait);
}

function stop() {
  columns.forEach((column) => column.stop());
}

function showRunning() {
  const isRunning = columns.some((column) => column.isRunning);
  if (!isRunning && document.activeElement === id("stop")) id("ask").focus();
  id("stop").hidden = !isRunning;
}

// ---- presets and sources ----

function option(value, text) {
  return new Option(text, value);
}

function group(label, options) {
  const element = document.createElement("optgroup");
  element.label = label;
  element.append(...options);
  return options.length ? [element] : [];
}

function savedOptions() {
  return group("Saved profiles", [...profiles.keys()].map((user) => option(`user:${user}`, user)));
}

function showChoices() {
  const own = option("", "A mixture of your own");
  own.hidden = true;
  const combinations = server.presets.map(({ name }, at) => option(`preset:${at}`, name));
  id("preset").replaceChildren(own, option("base", "Base alone"), ...group("Combinations", combinations), ...savedOptions());
  id("preset").disabled = false;
  for (const column of columns) {
    const { value } = column.select;
    column.select.replaceChildren(option("base", "Base alone"), option("mixture", "This mixture"), ...savedOptions());
    setSource(column, value);
  }
  showMixture();
}

function presetOf(value) {
  if (value.startsWith("user:")) return profiles.get(value.slice(5));
  return value.startsWith("preset:") ? server.presets[Number(value.slice(7))] : { weights: {} };
}

/** Update what depends on the sliders: the selected preset, and the second line of each column. */
function showMixture() {
  const { weights } = sliders;
  const values = [...id("preset").options].map(({ value }) => value).filter(Boolean);
  const matches = values.filter((value) => {
    const preset = presetOf(value);
    return isPlain(preset) && isSameMixture(preset.weights, weights);
  });
  // two presets may be the same mixture: the chosen one stays selected
  if (!matches.includes(id("preset").value)) id("preset").value = matches[0] ?? "";
  id("preset-note").textContent = "";
  columns.forEach(describe);
}

function choosePreset() {
  const { value } = id("preset");
  const preset = presetOf(value);
  const isExact = sliders.place(preset.weights) && isPlain(preset);
  showMixture();
  if (!isExact) {
    const user = value.slice(5);
    id("preset-note").textContent =
      `The sliders are near “${user}”, and cannot show all of it. To hear the profile itself, choose it above an answer.`;
  }
  settle(0);
  return isExact;
}

function setSource(column, source) {
  const known = [...column.select.options].some(({ value }) => value === source);
  column.select.value = known ? source : "base";
}

// ---- the address ----

function remember() {
  const sources = columns.map(({ source }) => source);
  writeLink({ weights: sliders.weights, prompt: id("prompt").value, sampling: sampling(), sources });
}

function followLink() {
  const link = readLink();
  sliders.place(link?.weights ?? (server.begin ?? server.presets[0])?.weights ?? {});
  if (link) {
    id("prompt").value = link.prompt;
    if ("temperature" in link.sampling) id("temperature").valueAsNumber = link.sampling.temperature;
    if ("seed" in link.sampling) id("seed").valueAsNumber = link.sampling.seed;
    if ("maxTokens" in link.sampling) id("max-tokens").valueAsNumber = link.sampling.maxTokens;
  }
  columns.forEach((column, at) => setSource(column, link?.sources[at] ?? ["base", "mixture"][at]));
  showMixture();
  columns.forEach((column) => column.invite());
}

// ---- the server ----

async function load() {
  const isAgain = !id("trouble").hidden || !id("key").hidden;
  id("trouble").hidden = true;
  try {
    const list = await loadExperts();
    const saved = list.has_store ? await loadSaved(list.user ?? null) : null;
    id("key").hidden = true;
    document.querySelector("main").hidden = false;
    show(list, saved);
    if (saved && !list.user) savedProfiles.list();
    if (isAgain) id("prompt").focus(); // the pressed button is gone
  } catch (error) {
    if (error.status === 401) return askForKey(error);
    document.querySelector("main").hidden = true;
    id("trouble").hidden = false;
    id("trouble").querySelector("p").textContent =
      error instanceof ApiError ? error.message : `The server's answer makes no sense to this page: ${error.message}`;
  }
  return undefined;
}

function show(list, saved) {
  server.base = list.base;
  server.startedWith = list.started_with?.length ? list.started_with : ["--base", list.base, "--experts", "experts"];
  const firsts = new Set(list.dimensions.map(({ first }) => first));
  server.isScored = list.dimensions.some((dimension) => dimension.is_scored);
  const num = list.data.length;
  id("server").textContent = `Playground · ${list.base} with ${num} expert${num === 1 ? "" : "s"}`;
  sliders.build(slidersOf(list));
  server.presets = combinationsOf(sliders.sliders, list.preset_weight ?? 0.6);
  // Start with the first sides of the catalogue: with all weights 0, both columns would show the base's answer.
  server.begin = server.presets.find(({ weights }) => Object.keys(weights).every((name) => firsts.has(name)));
  profiles.clear();
  for (const { user, profile } of saved ?? []) profiles.set(user, profile);
  id("save").hidden = saved === null;
  id("saved").hidden = saved === null || Boolean(list.user); // a key of one user may not list the others
  if (list.user) id("user").value = list.user;
  id("user").readOnly = Boolean(list.user);
  id("find-taste").hidden = !list.has_questions;
  id("storeless").hidden = saved !== null;
  showChoices();
  followLink();
  if (profiles.size < MOST_PROFILES) return;
  id("preset-note").textContent = `The first ${profiles.size} saved profiles are listed; search below for the others.`;
}

function askForKey() {
  const isSecond = isKeyed();
  setKey("");
  id("key").hidden = false;
  document.querySelector("main").hidden = !server.base; // the controls need the list of experts
  id("key-error").textContent = isSecond ? "The server does not know this key." : "";
  id("key-input").focus();
}

/** The saved profiles, or with a key that is bound to one user, this user's profile. */
async function loadSaved(user) {
  if (user !== null) return loadProfile(user).then((stored) => [stored], () => []);
  const saved = await loadProfiles(MOST_PROFILES);
  return [...saved, ...(await loadLinked(saved))];
}

/** The saved profiles in the page's address, which the first page of profiles may not contain. */
async function loadLinked(saved) {
  const sources = (readLink()?.sources ?? []).filter((source) => source?.startsWith("user:"));
  const users = new Set(sources.map((source) => source.slice(5)));
  for (const { user } of saved) users.delete(user);
  const found = await Promise.all([...users].map((user) => loadProfile(user).catch(() => null)));
  return found.filter((stored) => stored?.profile); // a deleted profile becomes the base
}

function saved(user, profile) {
  changed(user, profile);
  id("preset").value = `user:${user}`;
  if (!id("saved").hidden) savedProfiles.list();
}

/** Store a profile's new version; null means that the profile was deleted. */
function changed(user, profile) {
  const showing = columns.filter(({ source }) => source === `user:${user}`);
  if (profile) profiles.set(user, profile);
  else profiles.delete(user);
  showChoices();
  if (profile && asked !== null) showing.forEach(run);
  if (!profile) showing.forEach(sourceChanged); // their source is the base now
}

/** Move the sliders to a saved profile. Older versions cannot be chosen as a source. */
function use(user, profile, version) {
  if (version === null) {
    profiles.set(user, profile);
    showChoices();
    id("preset").value = `user:${user}`;
    return choosePreset();
  }
  const isExact = sliders.place(profile.weights) && isPlain(profile);
  showMixture();
  settle(0);
  return isExact;
}

/** Move the sliders to what the answers to questions gave; user is null if it was not saved. */
function useTaste(profile, user) {
  sliders.place(profile.weights);
  showMixture();
  if (user !== null) saved(user, profile);
  id("preset-note").textContent = `The sliders show what you prefer${user === null ? "" : `, saved as “${user}”`}.`;
  settle(0);
}

// ---- events ----

id("ask").addEventListener("click", ask);
id("stop").addEventListener("click", stop);
id("preset").addEventListener("change", choosePreset);
id("sampling").addEventListener("change", remember);
id("prompt").addEventListener("change", remember);
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    id("prompt").value = chip.textContent;
    ask();
    if (!chip.checkVisibility()) id("answers").focus({ preventScroll: true }); // phones hide the examples after the first request
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  } else if (event.key === "Escape") {
    stop();
  }
});
addEventListener("hashchange", () => {
  if (server.base && readLink()) followLink();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment holds the mixture
  id("answers").focus();
});
id("trouble").querySelector("button").addEventListener("click", load);
id("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = id("key-input").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    id("key-error").textContent = "A key is made of plain letters, digits and signs, without a space.";
    return;
  }
  setKey(key);
  id("key-input").value = "";
  load();
});
const taste = new Taste({ use: useTaste, refusedKey: askForKey });
id("find-taste").addEventListener("click", () => taste.open(id("user").value.trim(), id("user").readOnly));
const savedProfiles = new SavedProfiles({ use, changed, refusedKey: askForKey });
startKeeping({
  profile: () => profileOf(sliders.sliders, sliders.weights),
  texts: {
    yaml: () => profileText(id("user").value.trim() || "anonymous", profileOf(sliders.sliders, sliders.weights)),
    command: () => commandText(server.startedWith, profileOf(sliders.sliders, sliders.weights), promptToCopy(), sampling()),
    curl: () => curlText(CHAT_URL, requestOf(sourceOf("mixture"), promptToCopy(), sampling()), isKeyed()),
    link: () => {
      remember();
      return location.href;
    },
  },
  isSaved: (user) => profiles.has(user),
  onSaved: saved,
  onRefusedKey: askForKey,
});

function promptToCopy() {
  return id("prompt").value.trim() || asked || id("examples").querySelector("button").textContent;
}

load();
