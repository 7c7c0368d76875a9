// Bundles src/ into hookattn-viewer.js, the same bytes for the same sources. `--out FILE` writes elsewhere.
import { build } from "esbuild";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const at = process.argv.indexOf("--out");

await build({
  absWorkingDir: here,
  entryPoints: [join("src", "index.ts")],
  outfile: at < 0 ? join(here, "hookattn-viewer.js") : process.argv[at + 1],
  bundle: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  minify: true,
  charset: "utf8",
  legalComments: "inline",
  loader: { ".css": "text" },
  logLevel: "warning",
});
