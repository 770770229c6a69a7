// The browser of held-out responses: all models side by side, filtered, searched, and shown page by page.
(() => {
  const box = document.getElementById("sample-list");
  if (!box) return;
  const pageSize = 20;
  const { texts, prompts, answers, total } = report.samples;
  const controls = Object.fromEntries(
    ["temperature", "filter", "base", "search", "models", "count", "previous", "next", "page"].map((name) => [
      name,
      document.getElementById(`sample-${name}`),
    ]),
  );
  const models = [...new Set(Object.values(answers).flatMap((found) => Object.keys(found)))];
  const policies = models.filter((name) => report.rows.some((row) => row.model === name && row.role === "policy"));
  const [first, last] = [models[0], policies[policies.length - 1] ?? models[models.length - 1]];
  const scores = Object.values(answers).flatMap((found) => Object.values(found).flatMap((list) => list.map((answer) => answer?.[1])));
  const isBinary = scores.every((score) => score === 0 || score === 1 || score === null || score === undefined);
  const controlNames = new Set(report.rows.filter((row) => row.role === "control").map((row) => row.model));
  let lowered = null; // the texts in lower case, made for the first search
  let page = 0;
  // What the reader has chosen; read from the controls once per change.
  let [temperature, shownModels, query] = ["", [], ""];

  const answer = (model, number) => answers[temperature][model]?.[number] ?? null;
  const score = (model, number) => answer(model, number)?.[1] ?? null;
  const both = (test) => (number) => score(first, number) !== null && score(last, number) !== null && test(score(first, number), score(last, number));
  const filters = {
    all: ["everything", () => true],
    changed: [`${last} differs from ${first}`, (number) => answer(first, number)?.[0] !== answer(last, number)?.[0]],
    better: [`${last} scores higher than ${first}`, both((before, after) => after > before)],
    worse: [`${last} scores lower than ${first}`, both((before, after) => after < before)],
    ...(isBinary && {
      right: [`${last} is right`, (number) => score(last, number) === 1],
      wrong: [`${last} is wrong`, (number) => score(last, number) === 0],
    }),
    truncated: ["a response was truncated", (number) => shownModels.some((model) => answer(model, number)?.[3])],
  };

  function option(value, text) {
    return element("option", { value }, text);
  }

  function setUp() {
    const temperatures = Object.keys(answers).sort((a, b) => a - b);
    controls.temperature.append(...temperatures.map((t) => option(t, t === "0" ? "0 (greedy)" : t)));
    controls.filter.append(...Object.entries(filters).map(([value, [text]]) => option(value, text)));
    controls.base.append(
      option("previous", "the model before it"),
      option("truth", "the ground truth"),
      option("none", "nothing"),
      ...models.map((name) => option(`model:${name}`, name)),
    );
    for (const name of models) {
      const box = element("input", { type: "checkbox", value: name });
      box.checked = true;
      controls.models.append(element("label", {}, box, name));
    }
    document.getElementById("sample-controls").addEventListener("submit", (event) => event.preventDefault());
    for (const name of ["temperature", "filter", "base", "models"]) controls[name].addEventListener("change", restart);
    controls.search.addEventListener("input", restart);
    controls.previous.addEventListener("click", () => turn(-1));
    controls.next.addEventListener("click", () => turn(1));
  }

  function readControls() {
    temperature = controls.temperature.value;
    const checked = [...controls.models.querySelectorAll("input:checked")].map((input) => input.value);
    shownModels = checked.filter((name) => answers[temperature][name]);
    query = controls.search.value.trim().toLowerCase();
  }

  function matching() {
    const test = filters[controls.filter.value][1];
    const passing = prompts.map((_, number) => number).filter(test);
    if (!query) return passing;
    lowered ??= texts.map((text) => text.toLowerCase());
    const hit = lowered.map((text) => text.includes(query));
    return passing.filter((number) => {
      const [id, prompt, truth] = prompts[number];
      return hit[prompt] || hit[truth] || shownModels.some((name) => hit[answer(name, number)?.[0]]) || id.toLowerCase() === query;
    });
  }

  function restart() {
    page = 0;
    show();
  }

  function turn(step) {
    page += step;
    show();
    document.getElementById("sample-controls").scrollIntoView({ block: "start" });
  }

  function show() {
    readControls();
    const numbers = matching();
    const pages = Math.max(1, Math.ceil(numbers.length / pageSize));
    page = Math.min(page, pages - 1);
    box.replaceChildren(...numbers.slice(page * pageSize, (page + 1) * pageSize).map(sample));
    const rest = prompts.length < total ? ` (the first ${prompts.length} of ${total} prompts are on this page; eval.parquet has all)` : "";
    controls.count.textContent = `${numbers.length} of ${prompts.length} prompts${rest}`;
    controls.page.textContent = `page ${page + 1} of ${pages}`;
    controls.previous.disabled = page === 0;
    controls.next.disabled = page >= pages - 1;
  }

  function sample(number) {
    const [id, prompt, truth] = prompts[number];
    return element(
      "article",
      { class: "sample" },
      element("h3", {}, id),
      element("div", { class: "given" }, given("Prompt", texts[prompt]), ...(truth === null ? [] : [given("Ground truth", texts[truth])])),
      element("div", { class: "answers" }, ...shownModels.map((name, index) => shownAnswer(name, number, before(index)))),
    );
  }

  // The model that the one at an index came from: the control is a branch of its own.
  function before(index) {
    return shownModels.slice(0, index).filter((name) => !controlNames.has(name)).pop();
  }

  function given(title, text) {
    return element("div", {}, element("div", { class: "who" }, element("strong", {}, title)), element("div", { class: "said" }, ...marked(text)));
  }

  function shownAnswer(name, number, previous) {
    const found = answer(name, number);
    const who = element("div", { class: "who" }, element("strong", {}, name));
    if (!found) return element("div", { class: "answer" }, who, "no response");
    const [text, value, tokens, isTruncated] = found;
    const kind = !isBinary || value === null ? "" : value === 1 ? "right" : "wrong";
    const judged = value === null ? "not scored" : isBinary ? kind : `score ${value}`;
    who.append(element("span", { class: kind }, judged), element("span", {}, `${tokens} tokens${isTruncated ? ", truncated" : ""}`));
    const base = baseText(name, number, previous);
    return element("div", { class: `answer ${kind}` }, who, element("div", { class: "said" }, ...(base === null ? marked(texts[text]) : differences(base, texts[text]))));
  }

  // The text that a response is compared with; null for none.
  function baseText(name, number, previous) {
    const choice = controls.base.value;
    if (choice === "truth") return texts[prompts[number][2]] ?? null;
    const model = choice === "previous" ? previous : choice.startsWith("model:") ? choice.slice("model:".length) : undefined;
    const found = model === undefined || model === name ? null : answer(model, number);
    return found ? texts[found[0]] : null;
  }

  function differences(base, text) {
    const pieces = words.compare(base, text);
    if (pieces === null) return marked(text);
    const tags = { added: "ins", removed: "del" };
    return pieces.flatMap(([kind, piece]) => (kind === "same" ? marked(piece) : [element(tags[kind], {}, ...marked(piece))]));
  }

  // The text with every hit of the search marked.
  function marked(text) {
    const lower = text.toLowerCase();
    if (!query || lower.length !== text.length) return [text];
    const parts = [];
    let position = 0;
    for (let hit = lower.indexOf(query); hit >= 0; hit = lower.indexOf(query, position)) {
      parts.push(text.slice(position, hit), element("mark", {}, text.slice(hit, hit + query.length)));
      position = hit + query.length;
    }
    return [...parts, text.slice(position)];
  }

  setUp();
  show();
})();
