// The page's only script: a question to /ask, its answers as cards that play at their moment.
const form = document.getElementById("form");
const status = document.getElementById("status");
const answers = document.getElementById("answers");
let latest = 0;

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function card(hit, rank) {
  const item = element("li", "", { class: "card" });
  const middle = (hit.start_s + hit.end_s) / 2;
  const video = element("video", "", {
    controls: "", preload: "none", muted: "", playsinline: "",
    poster: `/frame/${hit.number}/${middle.toFixed(2)}.jpg`,
    src: `/video/${hit.number}#t=${hit.start_s.toFixed(2)},${hit.end_s.toFixed(2)}`,
    "aria-label": `${hit.video}, ${hit.span}`,
  });
  video.addEventListener("error", () => {
    if (video.error && !item.querySelector(".unsure"))
      about.append(element("span", "This browser cannot play the file.", { class: "unsure" }));
  });
  const about = element("div", "", { class: "about" });
  about.append(element("b", hit.video));
  const facts = element("div", "", { class: "facts" });
  facts.append(element("span", `${rank}.`), element("span", hit.span));
  if (hit.sure !== null) {
    const sure = Math.round(100 * hit.sure);
    facts.append(
      element("meter", "", { min: 0, max: 1, value: hit.sure, "aria-label": `${sure} % sure` }),
      element("span", `${sure} % sure`, {
        title: `stands out more than the best window of ${sure} % of random sentences`,
      }),
    );
  }
  facts.append(element("span", hit.score.toFixed(3), { title: "cosine similarity" }));
  about.append(facts);
  item.append(video, about);
  return item;
}

function show(answer) {
  answers.replaceChildren(...answer.models.map((model) => {
    const section = element("section");
    section.append(element("h2", model.model));
    if (model.warning) section.append(element("p", model.warning, { class: "unsure" }));
    const list = element("ol", "", { class: "hits" });
    list.append(...model.hits.map((hit, place) => card(hit, place + 1)));
    section.append(model.hits.length ? list : element("p", "No window is meant by these filters."));
    return section;
  }));
}

async function ask() {
  const mine = ++latest; // an answer that comes after a later question is not shown
  const words = new URLSearchParams();
  for (const [key, value] of new FormData(form)) if (value) words.set(key, value);
  status.textContent = "Searching…";
  const began = performance.now();
  try {
    const response = await fetch(`/ask?${words}`);
    if (!response.ok) throw new Error(await response.text());
    const answer = await response.json();
    if (mine !== latest) return;
    show(answer);
    const found = answer.models.reduce((sum, model) => sum + model.hits.length, 0);
    status.textContent = `${found} moments for “${answer.question}” in ${Math.round(performance.now() - began)} ms`;
    history.replaceState(null, "", `/?${words}`);
  } catch (error) {
    if (mine === latest) status.textContent = `No answer: ${error.message}`;
  }
}

form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
for (const [key, value] of new URLSearchParams(location.search))
  if (form.elements[key]) form.elements[key].value = value;
if (form.elements.q.value) ask();
