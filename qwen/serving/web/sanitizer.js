// Removes from messages what could draw over the page, ask for input or act when it is clicked.
//
// Gradio sanitizes HTML of everything that runs, but leaves forms, styles and positions. A MutationObserver is called
// before the browser paints what was added, whichever component of Gradio has added it. CSS in launch.py keeps
// whatever is left inside of its message.
(() => {
  const MESSAGES = "#chat .md";
  const HTML = new Set(
    `a abbr b blockquote br caption cite code dd del details dfn div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i
    img ins kbd li mark ol p pre q s samp small span strike strong sub summary sup table tbody td tfoot th thead tr tt
    u ul var wbr`.split(/\s+/),
  );
  const SVG = new Set("svg g path line rect circle".split(" ")); // of KaTeX and the copy button
  const ATTRIBUTES = new Set(
    `align alt aria-hidden class colspan d dir fill height href lang open preserveAspectRatio rel rowspan src start
    stroke stroke-width style target title viewBox width x x1 x2 y y1 y2`.split(/\s+/),
  );
  // KaTeX positions parts of formulas with these.
  const STYLES = /^(height|min-width|width|vertical-align|top|margin-(left|right)|padding-left|border-\w+-width|border-\w+-style|border-color|color|background-color|position|font-size)$/;
  const CLASSES = /^(code_wrap|copy_code_button|copy-text|check|language-[\w-]+|token|latex-block|katex.*)$/;
  // Chromium crashes when it lays out about 1,400 elements in each other, as of $a^{a^{a^…$.
  const MAX_DEPTH = 400;
  const LINKS = new Set(["http:", "https:", "mailto:"]);

  const isCopyButton = (element) =>
    element.localName === "button" && element.className === "copy_code_button" && element.parentElement?.className === "code_wrap";

  function isAllowed(element) {
    if (element.namespaceURI.endsWith("/MathML")) return !["maction", "mglyph"].includes(element.localName);
    if (element.namespaceURI.endsWith("/svg")) return SVG.has(element.localName);
    return HTML.has(element.localName) || isCopyButton(element);
  }

  // Classes of Gradio's own styles position elements as well.
  function cleanClass(element) {
    if (element.closest(".katex") || element.matches("pre > code .token")) return;
    for (const name of [...element.classList]) if (!CLASSES.test(name)) element.classList.remove(name);
  }

  function cleanStyle(element) {
    const style = element.style;
    if (!style || !element.closest(".katex")) {
      element.removeAttribute("style");
      return;
    }
    for (const name of [...style]) {
      const value = style.getPropertyValue(name);
      if (!STYLES.test(name) || value.includes("(") || (name === "position" && value !== "relative"))
        style.removeProperty(name);
    }
  }

  function cleanLink(element) {
    let url = null;
    try {
      url = new URL(element.getAttribute("href"), location.href);
    } catch {}
    // A link to this page itself could log out; one inside of the message has nowhere to go, since ids are removed.
    if (url === null || !LINKS.has(url.protocol) || url.origin === location.origin) {
      element.removeAttribute("href");
      return;
    }
    element.target = "_blank";
    element.rel = "noopener noreferrer nofollow";
  }

  function clean(element) {
    if (element.classList.contains("mermaid")) {
      // Gradio would draw a diagram, with styles and links of its own.
      element.replaceWith(Object.assign(document.createElement("pre"), { textContent: element.textContent }));
      return;
    }
    if (!isAllowed(element)) {
      const box = element.matches("li > input[type=checkbox][disabled]:first-child, li > p > input[type=checkbox][disabled]");
      element.replaceWith(box ? (element.checked ? "☑ " : "☐ ") : element.outerHTML);
      return;
    }
    for (const { name } of [...element.attributes]) if (!ATTRIBUTES.has(name)) element.removeAttribute(name);
    if (element.hasAttribute("class")) cleanClass(element);
    if (element.hasAttribute("style")) cleanStyle(element);
    if (element.localName === "a") cleanLink(element);
    else element.removeAttribute("href");
    if (element.localName === "img" && new URL(element.src, location.href).origin === location.origin) element.removeAttribute("src");
  }

  function cleanTree(node) {
    if (!(node instanceof Element)) return;
    if (node.parentElement?.closest(MESSAGES)) cleanAll(node);
    else node.querySelectorAll(`${MESSAGES} > *`).forEach(cleanAll);
  }

  function depthOf(root) {
    let depth = 0, deepest = 0;
    for (let element = root; ; ) {
      if (element.firstElementChild) {
        element = element.firstElementChild;
        deepest = Math.max(deepest, ++depth);
        continue;
      }
      for (; element !== root && !element.nextElementSibling; depth--) element = element.parentElement;
      if (element === root) return deepest;
      element = element.nextElementSibling;
    }
  }

  // Show formulas, or whatever else is too deep, as text.
  function flatten(root) {
    if (depthOf(root) <= MAX_DEPTH) return;
    for (const formula of [root, ...root.querySelectorAll(".katex")])
      if (formula.matches(".katex") && depthOf(formula) > MAX_DEPTH / 2)
        formula.replaceWith(formula.querySelector("annotation")?.textContent ?? formula.textContent);
    if (depthOf(root) > MAX_DEPTH) root.textContent = root.textContent;
  }

  function cleanAll(root) {
    flatten(root);
    const elements = [root, ...root.querySelectorAll("*")];
    for (const element of elements) if (element.isConnected) clean(element);
  }

  new MutationObserver((records) => {
    for (const record of records) record.addedNodes.forEach(cleanTree);
  }).observe(document, { childList: true, subtree: true });
})();
