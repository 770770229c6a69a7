// The data of the page, and how its elements are made: texts only ever become text nodes, never HTML.
const report = JSON.parse(document.getElementById("data").textContent);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

document.getElementById("theme").addEventListener("click", theme.toggle);
