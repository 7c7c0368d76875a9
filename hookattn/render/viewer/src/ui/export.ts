/** What a view has drawn, as one SVG or PNG: its <svg>s, its <canvas>es, its labels and sentences, where they are. */
const INHERITED = [
  "fill",
  "fill-opacity",
  "stroke",
  "stroke-width",
  "stroke-opacity",
  "stroke-dasharray",
  "opacity",
  "font-family",
  "font-size",
  "font-weight",
  "text-decoration-line",
  "text-anchor",
  "dominant-baseline",
  "visibility",
  "display",
] as const;
const SVG = "http://www.w3.org/2000/svg";

const [MARGIN, LINE, SIZE] = [8, 18, 13];
/** A picture is at least as wide as a few words of its title. */
const NARROW = 360;

/** `title`: its parts, which stand above the picture, in as many lines as its width takes. */
export function toSvg(figure: HTMLElement, title: readonly string[]): string {
  const frame = figure.getBoundingClientRect();
  const [left, top] = [frame.left - figure.scrollLeft, frame.top - figure.scrollTop];
  const parts: Element[] = [];
  let [width, height] = [0, 0];
  for (const element of figure.querySelectorAll<HTMLElement | SVGSVGElement>("svg, canvas, .label, .sentence")) {
    const box = element.getBoundingClientRect();
    if (box.width === 0 || box.height === 0 || element.closest(".notice, .tip")) continue;
    const [x, y] = [box.left - left, box.top - top];
    parts.push(
      ...(element instanceof HTMLCanvasElement
        ? [picture(element, x, y, box)]
        : element instanceof SVGSVGElement
          ? [drawing(element, x, y, box)]
          : words(element, x, y, box)),
    );
    width = Math.max(width, x + box.width);
    height = Math.max(height, y + box.height);
  }
  width = Math.max(width, NARROW);
  const style = getComputedStyle(figure.closest(".ha")!);
  const lines = wrapped(title, width - 2 * MARGIN, `600 ${SIZE}px ${style.fontFamily}`);
  const head = lines.length * LINE + MARGIN;
  const root = make("svg", { xmlns: SVG, width, height: height + head, viewBox: `0 ${-head} ${width} ${height + head}` });
  root.append(make("rect", { y: -head, width, height: height + head, fill: style.backgroundColor }));
  lines.forEach((line, i) => {
    const text = make("text", {
      x: MARGIN,
      y: (i + 1) * LINE - head,
      fill: style.color,
      "font-family": style.fontFamily,
      "font-size": SIZE,
      "font-weight": i === 0 ? 600 : 400,
    });
    text.textContent = line;
    root.append(text);
  });
  root.append(...parts);
  return new XMLSerializer().serializeToString(root);
}

function wrapped(parts: readonly string[], width: number, font: string, between = " · "): string[] {
  const measure = document.createElement("canvas").getContext("2d")!;
  measure.font = font;
  const fits = (text: string) => measure.measureText(text).width <= width;
  const lines: string[] = [];
  for (const part of parts) {
    // A name may be longer than the picture is wide.
    let kept = part;
    while (kept.length > 2 && !fits(kept)) kept = `${kept.slice(0, -2)}…`;
    const joined = lines.length === 0 ? kept : lines.at(-1)! + between + kept;
    if (lines.length > 0 && fits(joined)) lines[lines.length - 1] = joined;
    else lines.push(kept);
  }
  return lines;
}

export async function toPng(figure: HTMLElement, title: readonly string[]): Promise<Blob> {
  const svg = toSvg(figure, title);
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const scale = Math.min(2, 16_000 / Math.max(image.width, image.height, 1));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  canvas.getContext("2d")!.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) =>
      blob === null ? reject(new Error("The browser could not make a PNG of this size.")) : resolve(blob),
    );
  });
}

export function download(blob: Blob, name: string): string {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  return `Saved ${name}.`;
}

function make(tag: string, attributes: Record<string, string | number>): SVGElement {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes))
    if (name !== "xmlns") element.setAttribute(name, String(value));
  return element;
}

function picture(canvas: HTMLCanvasElement, x: number, y: number, { width, height }: DOMRect): Element {
  const image = make("image", { x, y, width, height, preserveAspectRatio: "none", href: canvas.toDataURL() });
  image.setAttribute("style", "image-rendering: pixelated");
  return image;
}

/** A copy whose styles are its own: the style sheet does not travel with it. */
function drawing(svg: SVGSVGElement, x: number, y: number, { width, height }: DOMRect): Element {
  const copy = svg.cloneNode(true) as SVGSVGElement;
  const [from, to] = [
    [svg, ...svg.querySelectorAll("*")],
    [copy, ...copy.querySelectorAll("*")],
  ];
  from.forEach((element, i) => {
    const style = getComputedStyle(element);
    const own = to[i]!;
    own.removeAttribute("style");
    own.removeAttribute("class");
    if (element !== svg) for (const name of INHERITED) own.setAttribute(name, style.getPropertyValue(name));
  });
  for (const [name, value] of Object.entries({ x, y, width, height })) copy.setAttribute(name, String(value));
  return copy;
}

/** Text in the lines that its width takes. */
function words(element: HTMLElement, x: number, y: number, { width, height }: DOMRect): Element[] {
  const style = getComputedStyle(element);
  const font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
  const all = element.textContent.trim();
  const lines = element.matches(".sentence") ? wrapped(all.split(/\s+/), width, font, " ") : [all];
  return lines.map((line, i) => {
    const text = make("text", {
      x,
      y: y + ((i + 0.5) * height) / lines.length,
      "dominant-baseline": "central",
      fill: style.color,
      "font-family": style.fontFamily,
      "font-size": style.fontSize,
    });
    text.textContent = line;
    return text;
  });
}
