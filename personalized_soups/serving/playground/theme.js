// Applies the theme of an earlier visit. This is a plain script, so it runs before the first paint and no other theme
// flashes. The theme is the only thing that the page stores.
(() => {
  const STORED = "psoups-theme";
  const THEMES = ["auto", "light", "dark"];

  const stored = () => {
    try {
      return localStorage.getItem(STORED);
    } catch {
      return null; // the browser may forbid storage
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
