/** A box of text beside the pointer, inside an element of `position: relative`. */
export interface TipAt {
  x: number;
  y: number;
  text: string;
}

export function Tip({ tip, width }: { tip: TipAt | null; width: number }) {
  if (tip === null) return null;
  const right = tip.x > width / 2;
  const side = right ? { right: `${width - tip.x + 14}px` } : { left: `${tip.x + 14}px` };
  return (
    <div
      class="tip"
      style={{ ...side, top: `${tip.y + 12}px`, maxWidth: `${Math.min(300, Math.max(140, width / 2 - 20))}px` }}
    >
      {tip.text}
    </div>
  );
}
