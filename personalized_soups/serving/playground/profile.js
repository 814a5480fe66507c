// Slider positions to mixing weights and back, and the texts that take a mixture elsewhere. No DOM, no network.
//
// A slider has a `high` expert and perhaps a `low` one. Its position goes from -1 to 1; below 0 the low expert has the
// weight, above 0 the high one. An extra expert has a slider of its own, whose position is its weight, negative or not.

export const STEP = 0.05;

const rounded = (number) => Number(number.toFixed(4)); // what is left of 0.1 + 0.2
const clamped = (number) => Math.max(-1, Math.min(1, number));

/** The sliders of a server's list of experts: one per two-sided dimension, then the extra experts. */
export function slidersOf(list) {
  const byName = new Map(list.data.map((expert) => [expert.name, expert]));
  const placed = new Set();
  const sliders = [];
  for (const dimension of list.dimensions) {
    const sideOf = (expert) => dimension.sides.indexOf(expert.side ?? expert.name);
    const [low, high, ...rest] = dimension.experts
      .map((name) => byName.get(name))
      .filter(Boolean)
      .sort((one, other) => sideOf(one) - sideOf(other));
    // two experts of one side do not oppose each other: they are no two ends of one slider
    if (!high || rest.length || sideOf(low) === sideOf(high)) continue;
    sliders.push({ name: dimension.name, about: dimension.about, low, high });
    placed.add(low.name).add(high.name);
  }
  for (const expert of list.data) {
    if (!placed.has(expert.name)) sliders.push({ name: expert.name, about: expert.about, low: null, high: expert });
  }
  return sliders;
}

/** The weights that are not zero, by expert, of one position per slider. */
export function weightsOf(sliders, positions) {
  const weights = {};
  sliders.forEach(({ low, high }, at) => {
    const position = rounded(positions[at]);
    if (position < 0 && low) weights[low.name] = -position;
    else if (position !== 0) weights[high.name] = position;
  });
  return weights;
}

/** The positions nearest to the weights, and whether the sliders show exactly them. */
export function positionsOf(sliders, weights) {
  const weightOf = (expert) => (expert && Object.hasOwn(weights, expert.name) ? weights[expert.name] : 0);
  const positions = sliders.map(({ low, high }) => clamped(weightOf(high) - weightOf(low)));
  const isExact = isSameMixture(weights, weightsOf(sliders, positions));
  return { positions, isExact };
}

/** Every combination of the two-sided dimensions at one weight; none where they would be too many to read. */
export function combinationsOf(sliders, weight) {
  const sided = sliders.filter(({ low }) => low);
  if (!sided.length || sided.length > 5) return [];
  let combinations = [{ name: "", weights: {} }];
  for (const { low, high } of sided) {
    combinations = combinations.flatMap(({ name, weights }) =>
      [low, high].map((expert) => ({
        name: name ? `${name} + ${expert.name}` : expert.name,
        weights: { ...weights, [expert.name]: weight },
      })),
    );
  }
  return combinations;
}

/** The profile as the server takes it, or null for the base alone. Two sides of one dimension have to be asked for. */
export function profileOf(sliders, weights) {
  if (!Object.values(weights).some((weight) => weight !== 0)) return null;
  const sides = new Map();
  let isOpposed = false;
  for (const { low, high } of sliders) {
    for (const expert of [low, high]) {
      if (!expert?.dimension || !weights[expert.name]) continue;
      const side = expert.side ?? expert.name;
      isOpposed ||= (sides.get(expert.dimension) ?? side) !== side;
      sides.set(expert.dimension, side);
    }
  }
  return isOpposed ? { weights, allow_opposed: true } : { weights };
}

/** Whether a saved profile is its weights and no more: not divided by their sum, not merged by another method. */
export function isPlain(profile) {
  const { method = "linear", normalize = "none", options = {}, rank = null } = profile;
  return method === "linear" && normalize === "none" && rank === null && Object.keys(options).length === 0;
}

export function weightText(weight) {
  return (weight < 0 ? "−" : "") + Math.abs(weight).toFixed(2);
}

/** Such as "friendly 0.60 · concise 0.40". */
export function mixtureText(weights) {
  const parts = Object.entries(weights).filter(([, weight]) => weight !== 0);
  return parts.map(([name, weight]) => `${name} ${weightText(weight)}`).join(" · ");
}

export function isSameMixture(one, other) {
  const names = new Set([...Object.keys(one), ...Object.keys(other)]);
  return [...names].every((name) => rounded(one[name] ?? 0) === rounded(other[name] ?? 0));
}

/** What is sent for one answer; `source` is {model, profile?}. */
export function requestOf(source, prompt, sampling) {
  return {
    model: source.model,
    messages: [{ role: "user", content: prompt }],
    stream: true,
    stream_options: { include_usage: true },
    temperature: sampling.temperature,
    seed: sampling.seed,
    max_tokens: sampling.maxTokens,
    ...(source.profile ? { profile: source.profile } : {}),
  };
}

// Words that YAML readers of one version or another take for something else than text.
const YAML_WORDS = /^(y|n|yes|no|on|off|true|false|null)$/i;

function yamlText(text) {
  return /^[A-Za-z][\w-]*$/.test(text) && !YAML_WORDS.test(text) ? text : JSON.stringify(text);
}

/** A profile file. */
export function profileText(user, profile) {
  const lines = [`user: ${yamlText(user)}`, "weights:"];
  for (const [name, weight] of Object.entries(profile.weights)) lines.push(`  ${yamlText(name)}: ${weight}`);
  if (profile.allow_opposed) lines.push("allow_opposed: true");
  return lines.join("\n") + "\n";
}

/** One word of a POSIX shell. */
export function shellText(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** `startedWith` is `--base ... --experts ...` as the server was started; a base alone takes no experts. */
export function commandText(startedWith, profile, prompt, sampling) {
  const words = ["psoups", "generate", ...(profile ? startedWith : startedWith.slice(0, 2))];
  if (profile) {
    const weights = Object.entries(profile.weights).map(([name, weight]) => `${name}=${weight}`);
    words.push("--weights", weights.join(","));
    if (profile.allow_opposed) words.push("--allow-opposed");
  }
  words.push("--temperature", `${sampling.temperature}`, "--seed", `${sampling.seed}`);
  words.push("--max-new-tokens", `${sampling.maxTokens}`);
  if (prompt.startsWith("-")) words.push("--"); // or it would be read as an option
  words.push(prompt);
  return words.map(shellText).join(" ");
}

/** The key itself is never in it: the shell reads it from a variable. */
export function curlText(url, request, isKeyed) {
  const parts = [`curl -N ${shellText(url)}`, `-H 'Content-Type: application/json'`];
  if (isKeyed) parts.push('-H "Authorization: Bearer $PSOUPS_API_KEY"');
  parts.push(`-d ${shellText(JSON.stringify(request))}`);
  return parts.join(" \\\n  ");
}
