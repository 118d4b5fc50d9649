// Runs before the page is painted, so that a remembered theme doesn't flash.
document.documentElement.classList.add("js");
try { document.documentElement.dataset.theme = localStorage.getItem("mmie-theme") ?? ""; } catch { /* storage is forbidden: the system's theme */ }
