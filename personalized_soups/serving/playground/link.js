// The fragment of the page's address, by which a link shares a mixture and a prompt. Browsers do not send fragments to
// servers. The fragment never contains the API key.

export function writeLink({ weights, prompt, sampling, sources }) {
  const fields = new URLSearchParams();
  for (const [name, weight] of Object.entries(weights)) fields.append("w", `${name}=${weight}`);
  if (prompt) fields.set("prompt", prompt);
  for (const [name, value] of Object.entries(sampling)) fields.set(name, value);
  sources.forEach((source, at) => fields.set(`column${at + 1}`, source));
  history.replaceState(null, "", `#${fields}`);
}

/** The content of the address, or null if it has none. The content is not trusted: a number may be invalid. */
export function readLink() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const known = ["w", "prompt", "temperature", "seed", "maxTokens", "column1", "column2"];
  if (!known.some((name) => fields.has(name))) return null;
  const weights = {};
  for (const text of fields.getAll("w")) {
    const at = text.lastIndexOf("=");
    const weight = Number(text.slice(at + 1));
    if (at > 0 && Number.isFinite(weight)) weights[text.slice(0, at)] = weight;
  }
  const sampling = {};
  for (const name of ["temperature", "seed", "maxTokens"]) {
    const value = Number.parseFloat(fields.get(name) ?? "");
    if (Number.isFinite(value)) sampling[name] = value;
  }
  const sources = [fields.get("column1"), fields.get("column2")];
  return { weights, prompt: fields.get("prompt") ?? "", sampling, sources };
}
