/** Whether the viewer is dark: as it was asked to be, as the page around it says, or as the system is. */
import { type ReadonlySignal, signal } from "@preact/signals";
import type { Options } from "./options";

/** What hosts write on the body or the root of their page, and which value means dark. A value that is neither says nothing. */
const SAID: readonly [attribute: string, dark: RegExp, light: RegExp][] = [
  ["data-jp-theme-light", /^false$/, /^true$/], // JupyterLab, Notebook 7
  ["data-vscode-theme-kind", /^vscode-(dark|high-contrast)$/, /^vscode-(high-contrast-)?light$/],
  ["data-theme", /^dark$/, /^light$/], // marimo, Sphinx themes
  ["theme", /^dark$/, /^light$/], // Colab
  ["class", /(^|\s)(vscode-dark|dark|dark-theme)(\s|$)/, /(^|\s)(vscode-light|light|light-theme)(\s|$)/],
];

/** Whether a page is dark; null: it does not say. */
function ofHost({ body, documentElement }: Document): boolean | null {
  for (const element of [body, documentElement]) {
    for (const [attribute, dark, light] of SAID) {
      const value = element.getAttribute(attribute);
      if (value !== null && dark.test(value)) return true;
      if (value !== null && light.test(value)) return false;
    }
  }
  // A page that sets one scheme alone has that ground, whatever the system's is.
  const scheme = getComputedStyle(body).colorScheme.replace("only", "").trim();
  return scheme === "dark" ? true : scheme === "light" ? false : null;
}

/** A page, and those around it that it is a frame of, as far as they may be read: a saved notebook shows it so. */
function* pages(own: Document): Generator<Document> {
  for (let page: Document | undefined = own; page; page = page.defaultView?.frameElement?.ownerDocument) yield page;
}

/** Whether a viewer in a page is dark, which may change at any time; never on paper. `stop` ends listening. */
export function darkness(page: Document, theme: Options["theme"]): { dark: ReadonlySignal<boolean>; stop(): void } {
  const queries = ["(prefers-color-scheme: dark)", "print"].map((query) => matchMedia(query));
  const [system, paper] = queries as [MediaQueryList, MediaQueryList];
  const hosts = [...pages(page)];
  const said = () => hosts.map(ofHost).find((dark) => dark !== null) ?? system.matches;
  const now = () => !paper.matches && (theme === "dark" || (theme !== "light" && said()));
  const dark = signal(now());
  const listen = () => {
    dark.value = now();
  };
  const watch = new MutationObserver(listen);
  const attributeFilter = [...SAID.map(([attribute]) => attribute), "style"];
  for (const { body, documentElement } of hosts)
    for (const element of [body, documentElement]) watch.observe(element, { attributeFilter });
  for (const query of queries) query.addEventListener("change", listen);
  return {
    dark,
    stop() {
      watch.disconnect();
      for (const query of queries) query.removeEventListener("change", listen);
    },
  };
}
