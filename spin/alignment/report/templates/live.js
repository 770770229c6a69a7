// A page served by `spin serve`: it shows what is running, and is loaded again when the run has new results.
(() => {
  const seconds = 2;
  // What the reader has chosen outlives the reload.
  const choices = ["training-axis", "sample-temperature", "sample-filter", "sample-base", "sample-search"];

  function reload() {
    const chosen = choices.map((id) => [id, document.getElementById(id)?.value]).filter(([, value]) => value !== undefined);
    sessionStorage.setItem("chosen", JSON.stringify(chosen));
    location.reload();
  }

  function restore() {
    for (const [id, value] of JSON.parse(sessionStorage.getItem("chosen") ?? "[]")) {
      const box = document.getElementById(id);
      if (!box || (box.options && ![...box.options].some((option) => option.value === value))) continue;
      box.value = value;
      for (const name of ["change", "input"]) box.dispatchEvent(new Event(name));
    }
    sessionStorage.removeItem("chosen");
  }

  async function check() {
    try {
      const running = await fetch("live", { cache: "no-store" });
      if (running.ok) {
        const lines = await running.json();
        document.getElementById("live").replaceChildren(...lines.flatMap((line) => [`▶ ${line}`, element("br")]));
      }
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== report.version) reload();
    } catch {
      // the server has ended: the page stays as it is
    }
  }
  restore();
  check();
  setInterval(check, 1000 * seconds);
})();
