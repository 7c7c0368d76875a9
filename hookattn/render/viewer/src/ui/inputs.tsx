/** What controls are made of. */
import type { ComponentChildren } from "preact";

export function Named({ name, children }: { name: string; children: ComponentChildren }) {
  return (
    <label class="control">
      <span class="name">{name}</span>
      {children}
    </label>
  );
}

/** A few choices, side by side. */
export function Segments<T extends string>(props: {
  name: string;
  value: T;
  of: [T, string, string?][];
  pick(value: T): void;
}) {
  return (
    <div class="control" role="group" aria-label={props.name}>
      <span class="name">{props.name}</span>
      <div class="segments">
        {props.of.map(([value, text, title]) => (
          <button
            key={value}
            type="button"
            title={title}
            aria-pressed={value === props.value}
            onClick={() => props.pick(value)}
          >
            {text}
          </button>
        ))}
      </div>
    </div>
  );
}

/** A slider over the values that there are; nothing where there is only one. */
export function Slider<T>(props: {
  name: string;
  values: readonly T[];
  value: T;
  text(value: T): string;
  pick(value: T): void;
}) {
  const at = Math.max(0, props.values.indexOf(props.value));
  if (props.values.length < 2) return null;
  return (
    <Named name={props.name}>
      <input
        type="range"
        min={0}
        max={props.values.length - 1}
        step={1}
        value={at}
        aria-label={props.name}
        aria-valuetext={props.text(props.value)}
        onInput={(event) => props.pick(props.values[Number(event.currentTarget.value)]!)}
      />
      <output>{props.text(props.value)}</output>
    </Named>
  );
}
