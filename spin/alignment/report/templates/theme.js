// The theme: the system's until the reader chooses one. Runs before the page is drawn, so that it does not flash.
const theme = (() => {
  const key = "spin-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];

  function chosen() {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // no storage for pages from disk in some browsers
    }
  }

  function apply() {
    document.documentElement.dataset.theme = chosen() ?? document.documentElement.dataset.chosen ?? (system.matches ? "dark" : "light");
    listeners.forEach((listener) => listener());
  }

  function toggle() {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    document.documentElement.dataset.chosen = next;
    try {
      localStorage.setItem(key, next);
    } catch {
      // the choice then lasts as long as the page
    }
    apply();
  }

  system.addEventListener("change", apply);
  apply();
  return { toggle, onChange: (listener) => listeners.push(listener) };
})();
