// A page served by `spin serve`: it is loaded again when the run has new results.
(() => {
  const seconds = 5;
  async function check() {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== report.version) location.reload();
    } catch {
      // the server has ended: the page stays as it is
    }
  }
  setInterval(check, 1000 * seconds);
})();
