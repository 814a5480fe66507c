// Show the answers to the chosen prompt for the chosen preferences. A search looks through all answers.
const filters = [...document.querySelectorAll("[data-filter]")];
const articles = [...document.querySelectorAll("article")];

function show() {
  const chosen = Object.fromEntries(filters.map((filter) => [filter.dataset.filter, filter.value]));
  const words = (chosen.text || "").trim().toLowerCase();
  for (const article of articles) {
    const fits = words
      ? article.textContent.toLowerCase().includes(words)
      : article.dataset.prompt === chosen.prompt && article.dataset.combination === chosen.combination;
    article.hidden = !fits;
  }
  const none = document.querySelector(".none");
  if (none) none.hidden = articles.some((article) => !article.hidden);
}

for (const filter of filters) filter.addEventListener("input", show);
show();
