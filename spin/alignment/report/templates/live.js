// A page served by `spin serve`: it shows what is running, and is loaded again when the run has new results.
(() => {
  const seconds = 2;
  async function check() {
    try {
      const running = await fetch("live", { cache: "no-store" });
      if (running.ok) {
        const lines = await running.json();
        document.getElementById("live").replaceChildren(...lines.flatMap((line) => [`▶ ${line}`, element("br")]));
      }
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== report.version) location.reload();
    } catch {
      // the server has ended: the page stays as it is
    }
  }
  check();
  setInterval(check, 1000 * seconds);
})();
