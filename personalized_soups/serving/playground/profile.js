// Converts slider positions to mixing weights and back, and writes a mixture as text. No DOM, no network.
//
// A slider has a `high` expert and may have a `low` one. Its position is between -1 and 1: a negative position is the
// weight of the low expert, a positive one that of the high expert. An extra expert has its own slider, whose position
// is the expert's weight and may be negative.

export const STEP = 0.05;

const rounded = (number) => Number(number.toFixed(4)); // removes the rounding error of sums such as 0.1 + 0.2
const clamped = (number) => Math.max(-1, Math.min(1, number));

/** The sliders for a list of experts: one per dimension with two sides, then one per extra expert. */
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
    // two experts of one side are not opposed, so they cannot be the ends of one slider
    if (!high || rest.length || sideOf(low) === sideOf(high)) continue;
    sliders.push({ name: dimension.name, about: dimension.about, low, high });
    placed.add(low.name).add(high.name);
  }
  for (const expert of list.data) {
    if (!placed.has(expert.name)) sliders.push({ name: expert.name, about: expert.about, low: null, high: expert });
  }
  return sliders;
}

/** The nonzero weights, by expert, for one position per slider. */
export function weightsOf(sliders, positions) {
  const weights = {};
  sliders.forEach(({ low, high }, at) => {
    const position = rounded(positions[at]);
    if (position < 0 && low) weights[low.name] = -position;
    else if (position !== 0) weights[high.name] = position;
  });
  return weights;
}

/** The positions nearest to the weights, and whether they equal the weights. */
export function positionsOf(sliders, weights) {
  const weightOf = (expert) => (expert && Object.hasOwn(weights, expert.name) ? weights[expert.name] : 0);
  const positions = sliders.map(({ low, high }) => clamped(weightOf(high) - weightOf(low)));
  const isExact = isSameMixture(weights, weightsOf(sliders, positions));
  return { positions, isExact };
}

/** All combinations of the two-sided dimensions at one weight; empty if there are too many to list. */
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

/** The profile in the server's format, or null for the base. Two sides of one dimension set `allow_opposed`. */
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

/** Whether a saved profile has only weights: no normalization, and no method other than linear. */
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

/** The request for one answer; `source` is {model, profile?}. */
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

// Words that some version of YAML does not read as text.
const YAML_WORDS = /^(y|n|yes|no|on|off|true|false|null)$/i;

function yamlText(text) {
  return /^[A-Za-z][\w-]*$/.test(text) && !YAML_WORDS.test(text) ? text : JSON.stringify(text);
}

/** The text of a profile file. */
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

/** `startedWith` holds the options of `psoups serve`, such as --base and --experts. The base alone needs no experts. */
export function commandText(startedWith, profile, prompt, sampling) {
  const words = ["psoups", "generate", ...(profile ? startedWith : startedWith.slice(0, 2))];
  if (profile) {
    const weights = Object.entries(profile.weights).map(([name, weight]) => `${name}=${weight}`);
    words.push("--weights", weights.join(","));
    if (profile.allow_opposed) words.push("--allow-opposed");
  }
  words.push("--temperature", `${sampling.temperature}`, "--seed", `${sampling.seed}`);
  words.push("--max-new-tokens", `${sampling.maxTokens}`);
  if (prompt.startsWith("-")) words.push("--"); // otherwise the prompt would be read as an option
  words.push(prompt);
  return words.map(shellText).join(" ");
}

/** The text never contains the API key: the shell reads the key from a variable. */
export function curlText(url, request, isKeyed) {
  const parts = [`curl -N ${shellText(url)}`, `-H 'Content-Type: application/json'`];
  if (isKeyed) parts.push('-H "Authorization: Bearer $PSOUPS_API_KEY"');
  parts.push(`-d ${shellText(JSON.stringify(request))}`);
  return parts.join(" \\\n  ");
}
