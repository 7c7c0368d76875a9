/** A ramp with its numbers. */
import { type Domain, type Ramp } from "../colours";
import { number } from "../format";

const WIDTH = 240;

export function Legend({
  domain,
  ramp,
  title,
  dropped,
  blank: word = "left out",
}: {
  domain: Domain;
  ramp: Ramp;
  title: string;
  /** Whether anything has no colour, and what that means. */
  dropped: boolean;
  blank?: string;
}) {
  const { low, high, scale } = domain;
  const parts = [0, 0.5, 1];
  const value = (part: number) => (scale === "log" ? low * (high / low) ** part : low + (high - low) * part);
  const id = `ramp-${ramp.stops.join("").replaceAll("#", "")}`;
  const blank = `#${[0, 8, 16].map((shift) => ((ramp.void >> shift) & 255).toString(16).padStart(2, "0")).join("")}`;
  return (
    <svg
      width={WIDTH + 20 + (dropped ? 90 : 0)}
      height={48}
      role="img"
      aria-label={`Colours: ${title} from ${number(low)} to ${number(high)}, ${scale}`}
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
      <rect x={1} y={17} width={WIDTH} height={10} fill={`url(#${id})`} stroke="var(--line)" />
      {parts.map((part) => (
        <text
          key={part}
          class="faint"
          x={1 + part * WIDTH}
          y={42}
          text-anchor={part === 0 ? "start" : part === 1 ? "end" : "middle"}
        >
          {part === 0 && scale === "log" ? "≤ " : ""}
          {number(value(part))}
        </text>
      ))}
      {dropped && <rect x={WIDTH + 18} y={16} width={12} height={12} fill={blank} stroke="var(--line)" />}
      {dropped && (
        <text class="faint" x={WIDTH + 36} y={26}>
          {word}
        </text>
      )}
    </svg>
  );
}
