// Keeping a mixture: saved as a profile, or copied as text.

import { saveProfile } from "./api.js";

const id = (name) => document.getElementById(name);

/**
 * `profile()` is the mixture as the server takes it, or null; `texts` makes each text that can be copied; `isSaved(user)`
 * tells whether a profile is known; `onSaved(user, profile)` hears of a new one.
 */
export function startKeeping({ profile, texts, isSaved, onSaved, onRefusedKey }) {
  let kept = null; // what waits for a word on replacing

  const say = (text, isWrong = false) => {
    id("keep-note").textContent = text;
    id("keep-note").classList.toggle("wrong", isWrong);
  };

  const ask = (user) => {
    id("conflict-text").textContent = `“${user}” is saved already. Replace it?`;
    id("conflict").hidden = false;
    id("replace").focus();
  };

  const settle = () => {
    kept = null;
    id("conflict").hidden = true;
    id("user").focus();
  };

  const save = async (isReplacing) => {
    const { user, wanted } = kept;
    say("Saving …");
    try {
      await saveProfile(user, wanted, { isReplacing });
    } catch (error) {
      say("");
      if (error.status === 412 && !isReplacing) return ask(user);
      if (error.status === 401) onRefusedKey(error);
      say(error.message, true);
      return settle();
    }
    settle();
    say(`Saved as “${user}”.`);
    return onSaved(user, wanted);
  };

  id("save").addEventListener("submit", (event) => {
    event.preventDefault();
    const user = id("user").value.trim();
    const wanted = profile();
    id("conflict").hidden = true;
    if (!user) {
      say("Give the profile a name first.", true);
      return id("user").focus();
    }
    if (user === "." || user === "..") {
      say("Browsers take this name out of an address: choose another.", true);
      return id("user").focus();
    }
    if (!wanted) return say("Move a slider first: a profile needs a weight.", true);
    kept = { user, wanted };
    say("");
    return isSaved(user) ? ask(user) : save(false);
  });
  id("replace").addEventListener("click", () => save(true));
  id("leave").addEventListener("click", () => {
    settle();
    say("Left as it was.");
  });

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => {
      const kind = button.dataset.copy;
      if (kind === "yaml" && !profile()) return say("Move a slider first: a profile needs a weight.", true);
      return copy(texts[kind](), button.textContent, say);
    });
  }
}

async function copy(text, name, say) {
  const field = id("copied").querySelector("textarea");
  id("copied").hidden = true;
  try {
    await navigator.clipboard.writeText(text);
    say(`Copied as ${name}.`);
  } catch {
    // no clipboard for a page on plain http, unless it is on this machine
    id("copied").hidden = false;
    field.value = text;
    field.focus();
    field.select();
    say("This browser keeps the clipboard from the page: the text is selected above.");
  }
}
