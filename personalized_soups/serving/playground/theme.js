// The theme of an earlier visit, before the first paint: a plain script, so that no page is seen in the other one first.
// This is all that the page ever stores.
(() => {
  const STORED = "psoups-theme";
  const THEMES = ["auto", "light", "dark"];

  const stored = () => {
    try {
      return localStorage.getItem(STORED);
    } catch {
      return null; // storage may be forbidden
    }
  };

  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (!button) return;
    button.querySelector("span").textContent = theme;
    button.setAttribute("aria-label", `Theme: ${theme}`);
  };

  const next = () => {
    const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    show(theme);
    try {
      localStorage.setItem(STORED, theme);
    } catch {
      // the theme then lasts as long as the page
    }
  };

  const first = THEMES.includes(stored()) ? stored() : "auto";
  show(first);
  document.addEventListener("DOMContentLoaded", () => {
    show(first);
    document.getElementById("theme").addEventListener("click", next);
  });
})();
