// Theme, search, copy buttons, tabs and the marker in the table of contents. Without JavaScript the pages read just as well.
const $ = (selector, root = document) => root.querySelector(selector), $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, properties = {}, ...children) => { const node = Object.assign(document.createElement(tag), properties); node.append(...children); return node; };

// Theme: the system's until the reader chooses.
const root = document.documentElement, switcher = $(".theme"), system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
const show = () => switcher.setAttribute("aria-pressed", isDark());
switcher.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("mmie-theme", root.dataset.theme); } catch { /* storage is forbidden: for this page only */ }
  show();
});
system.addEventListener("change", show); show();

// Copy buttons, on touch screens when the code is tapped; boxes that scroll can be reached with the keyboard.
for (const block of $$("div.sourceCode")) {
  const button = make("button", {className: "copy", type: "button", textContent: "Copy"});
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText($("code", block).innerText.trimEnd());
    button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
for (const box of $$("main pre, main .scroll, main .html-output, main .mmie-live, main .html-output [style*=overflow], main .equation, main .formula")) {
  if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
}

// Tabs.
for (const [t, set] of $$(".tabset").entries()) {
  const panels = $$(":scope > section", set), bar = make("div", {className: "tabs"});
  bar.setAttribute("role", "tablist");
  const choose = n => panels.forEach((panel, k) => { panel.hidden = k !== n; bar.children[k].setAttribute("aria-selected", k === n); bar.children[k].tabIndex = k === n ? 0 : -1; });
  for (const [n, panel] of panels.entries()) {
    const title = $(".tab", panel), tab = make("button", {type: "button", id: `tab-${t}-${n}`, innerHTML: title.innerHTML});
    title.remove(); tab.setAttribute("role", "tab"); panel.setAttribute("role", "tabpanel"); panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => choose(n));
    tab.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (step) { const next = (n + step + panels.length) % panels.length; choose(next); bar.children[next].focus(); }
    });
    bar.append(tab);
  }
  set.prepend(bar); choose(0);
}

// The section that is being read.
const entries = new Map($$(".toc a").map(link => [decodeURIComponent(link.hash.slice(1)), link]));
const headings = $$("main :is(h2, h3)[id]").filter(heading => entries.has(heading.id));
const mark = () => {
  const above = headings.filter(heading => heading.getBoundingClientRect().top < 140), current = above.at(-1) ?? headings[0];
  entries.forEach((link, id) => { if (id === current.id) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current"); });
  const link = entries.get(current.id), box = $(".toc");
  if (link.offsetTop < box.scrollTop || link.offsetTop > box.scrollTop + box.clientHeight - 60) box.scrollTop = link.offsetTop - box.clientHeight / 2;
};
if (headings.length) { let due; addEventListener("scroll", () => { due ??= requestAnimationFrame(() => { due = null; mark(); }); }, {passive: true}); mark(); }
$(".chapters [aria-current]")?.scrollIntoView({block: "nearest"});

// Search: the index is loaded when it's first asked for.
const dialog = $("dialog.search"), field = $("input", dialog), hits = $("#hits");
let index;
const load = src => new Promise((done, failed) => document.head.append(make("script", {src, onload: done, onerror: failed})));
const words = text => (text.match(/[\p{L}\p{N}_]+/gu) ?? []).flatMap(word => word.includes("_") ? [word, ...word.split("_")] : [word]).filter(Boolean);
const prepare = async () => {
  await Promise.all([load("minisearch.js"), load("sections.js")]);
  const rows = SECTIONS.map(([where, heading, text, page], id) => ({id, where, heading, text, page}));
  index = new MiniSearch({fields: ["heading", "text"], storeFields: ["where", "heading", "text", "page"], tokenize: words});
  index.addAll(rows);
};
const found = query => {
  const near = hit => hit.heading.toLowerCase() === query ? 1000 : hit.page === "symbol" ? 1.5 : /^(api|proofs)\./.test(hit.where) ? 0.3 : 1; // lists name everything
  return index.search(query, {boost: {heading: 4}, prefix: true, fuzzy: term => term.length > 4 && !term.includes("_") ? 0.15 : false, combineWith: "AND"})
    .map(hit => ({...hit, rank: hit.score * near(hit)})).sort((a, b) => b.rank - a.rank).slice(0, 30);
};
const excerpt = (hit, terms) => { // some words around the first that was found
  const first = Math.min(...terms.map(term => hit.text.toLowerCase().indexOf(term)).filter(n => n >= 0));
  const at = Number.isFinite(first) && first > 60 ? hit.text.indexOf(" ", first - 60) + 1 : 0;
  return (at ? "…" : "") + hit.text.slice(at, at + 170);
};
const choose = n => {
  const options = [...hits.children];
  options.forEach((option, k) => option.setAttribute("aria-selected", k === n));
  if (options[n]) { options[n].scrollIntoView({block: "nearest"}); field.setAttribute("aria-activedescendant", options[n].id); } else field.removeAttribute("aria-activedescendant");
};
const chosen = () => [...hits.children].findIndex(option => option.getAttribute("aria-selected") === "true");
const search = () => {
  const query = field.value.trim().toLowerCase(), list = query && index ? found(query) : [];
  hits.replaceChildren(...list.map((hit, n) => {
    const symbol = hit.page === "symbol", option = make("a", {href: hit.where, id: `hit-${n}`, tabIndex: -1},
      make(symbol ? "code" : "strong", {textContent: hit.heading}), make("small", {textContent: symbol ? hit.text : hit.page === hit.heading ? "" : hit.page}));
    if (!symbol) option.append(make("span", {textContent: excerpt(hit, hit.terms)}));
    option.setAttribute("role", "option");
    option.addEventListener("click", () => dialog.close());
    return option;
  }));
  if (query && index && !list.length) hits.append(make("p", {textContent: "Nothing found."}));
  field.setAttribute("aria-expanded", list.length > 0);
  choose(0);
};
const open = async () => {
  if (!dialog.open) dialog.showModal();
  field.select();
  if (!index) { await prepare(); search(); }
};
$(".search-open").addEventListener("click", open);
field.addEventListener("input", search);
field.addEventListener("keydown", event => {
  const count = hits.querySelectorAll("a").length, step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step && count) { event.preventDefault(); choose((chosen() + step + count) % count); }
  if (event.key === "Escape") dialog.close(); // at once, not after the field is cleared
  if (event.key === "Enter") { event.preventDefault(); hits.children[chosen()]?.click(); }
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
addEventListener("keydown", event => {
  const typing = event.target.matches?.("input, textarea, select, [contenteditable]");
  if ((event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) || (event.key === "k" && (event.ctrlKey || event.metaKey))) { event.preventDefault(); open(); }
});
