// Bundles src/ into hookattn-viewer.js, the same bytes for the same sources. `--out FILE` writes elsewhere.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { build, transform } from "esbuild";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));

/**
 * SHA-256 of the sources, of the colours shared with figures and of the pinned libraries: the bundle ends with it, so that a stale one is noticed without
 * node.
 */
function fingerprint() {
  const sources = readdirSync(join(here, "src"), { recursive: true }).map(
    (name) => `src/${name.replaceAll("\\", "/")}`,
  );
  const hash = createHash("sha256");
  for (const name of [...sources.filter((name) => /\.\w+$/.test(name)), "../palette.json", "build.mjs", "package-lock.json"].sort()) {
    hash
      .update(`${name}\n`)
      .update(readFileSync(join(here, name)))
      .update("\n");
  }
  return hash.digest("hex");
}

const at = process.argv.indexOf("--out");

await build({
  absWorkingDir: here,
  entryPoints: [join("src", "index.ts")],
  outfile: at < 0 ? join(here, "hookattn-viewer.js") : process.argv[at + 1],
  bundle: true,
  format: "esm",
  target: "es2022",
  // Elements as calls with their children after the attributes, which is shorter than what TypeScript checks them as.
  tsconfigRaw: {
    compilerOptions: { target: "ES2022", jsx: "react", jsxFactory: "createElement", jsxFragmentFactory: "Fragment" },
  },
  inject: [join("src", "jsx.ts")],
  minify: true,
  charset: "utf8",
  legalComments: "inline",
  plugins: [
    {
      name: "style",
      setup: ({ onLoad }) =>
        onLoad({ filter: /\.css$/ }, async ({ path }) => {
          const { code } = await transform(readFileSync(path, "utf8"), { loader: "css", minify: true, target: "es2022" });
          return { contents: code, loader: "text" };
        }),
    },
  ],
  footer: { js: `// sources: ${fingerprint()}` },
  logLevel: "warning",
});
