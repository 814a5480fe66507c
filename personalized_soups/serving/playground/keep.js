// Save a mixture as a profile, or copy it as text.

import { saveProfile } from "./api.js";

const id = (name) => document.getElementById(name);

/**
 * `profile()` returns the mixture in the server's format, or null. `texts` has a function for each text to copy.
 * `isSaved(user)` returns whether a profile exists. `onSaved(user, profile)` is called with each new profile.
 */
export function startKeeping({ profile, texts, isSaved, onSaved, onRefusedKey }) {
  let kept = null; // the profile that waits for a decision whether to replace

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
    // browsers offer no clipboard to pages on plain http, except on localhost
    id("copied").hidden = false;
    field.value = text;
    field.focus();
    field.select();
    say("This browser keeps the clipboard from the page: the text is selected above.");
  }
}
