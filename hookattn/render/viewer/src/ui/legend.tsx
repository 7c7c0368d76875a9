/** A ramp with its numbers. */
import { type Domain, type Ramp } from "../colours";
import { number } from "../format";
import { HATCHED, Hatching } from "./hatch";

const WIDTH = 240;

/** Without zeros at the end, which say nothing of where a scale ends. */
function short(x: number): string {
  return number(x).replace(/(\.\d*?)0+(?=e|$)/, "$1").replace(/\.(?=e|$)/, "");
}

export function Legend({
  domain,
  ramp,
  title,
  dropped,
  blank = "left out",
  choice,
}: {
  domain: Domain;
  ramp: Ramp;
  title: string;
  /** Whether anything is hatched, and what that means. */
  dropped: boolean;
  blank?: string;
  /** What the last colour means, where there is no other. */
  choice?: string;
}) {
  const { low, high, scale, clipped } = domain;
  const parts = [0, 0.5, 1];
  const value = (part: number) => (scale === "log" ? low * (high / low) ** part : low + (high - low) * part);
  const sign = (part: number) => {
    if (part === 1) return clipped ? "≥ " : "";
    return part === 0 && (scale === "log" || (clipped && low < 0)) ? "≤ " : "";
  };
  const id = `ramp-${ramp.stops.join("").replaceAll("#", "")}`;
  const end = choice === undefined ? WIDTH : 12;
  const at = choice === undefined ? WIDTH + 18 : 40 + 7 * choice.length;
  const numbers = `from ${short(low)} to ${short(high)}${clipped ? " and above" : ""}, ${scale}`;
  return (
    <svg
      width={Math.max(WIDTH, at) + 20 + (dropped ? 30 + 7 * blank.length : 0)}
      height={48}
      role="img"
      aria-label={`Colours: ${title} ${choice ?? numbers}${dropped ? `; hatched: ${blank}` : ""}`}
    >
      <defs>
        <linearGradient id={id}>
          {ramp.stops.map((stop, i) => (
            <stop key={stop} offset={i / (ramp.stops.length - 1)} stop-color={stop} />
          ))}
        </linearGradient>
      </defs>
      <text class="faint" x={1} y={11}>
        {title}
      </text>
      <rect
        x={1}
        y={17}
        width={end}
        height={choice === undefined ? 10 : 12}
        fill={choice === undefined ? `url(#${id})` : ramp.stops.at(-1)}
        stroke="var(--line)"
      />
      {choice === undefined ? (
        parts.map((part) => (
          <text
            key={part}
            class="faint"
            x={1 + part * WIDTH}
            y={42}
            text-anchor={part === 0 ? "start" : part === 1 ? "end" : "middle"}
          >
            {sign(part)}
            {short(value(part))}
          </text>
        ))
      ) : (
        <text class="faint" x={18} y={27}>
          {choice}
        </text>
      )}
      {dropped && <Hatching />}
      {dropped && <rect x={at} y={15} width={24} height={14} fill={HATCHED} stroke="var(--line)" />}
      {dropped && (
        <text class="faint" x={at + 30} y={27}>
          {blank}
        </text>
      )}
    </svg>
  );
}
