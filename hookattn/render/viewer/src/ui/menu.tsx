/** A button and what it opens: a popover, which a click beside it or Escape closes. */
import type { ComponentChildren } from "preact";
import { useRef, useState } from "preact/hooks";

const MARGIN = 8;

/** `told`: what is chosen in it, in words, beside its name. */
export function Menu({ name, told, children }: { name: string; told: string; children: ComponentChildren }) {
  const [open, setOpen] = useState(false);
  const button = useRef<HTMLButtonElement>(null);
  const panel = useRef<HTMLDivElement>(null);
  const stand = () => {
    const [by, box] = [button.current!.getBoundingClientRect(), panel.current!];
    const left = Math.max(MARGIN, Math.min(by.left, innerWidth - box.offsetWidth - MARGIN));
    const below = by.bottom + 4;
    const fits = below + box.offsetHeight + MARGIN <= innerHeight;
    box.style.left = `${left}px`;
    box.style.top = `${fits ? below : Math.max(MARGIN, innerHeight - box.offsetHeight - MARGIN)}px`;
  };
  return (
    <div class="menu">
      <button
        ref={button}
        type="button"
        aria-haspopup="dialog"
        aria-expanded={open}
        onClick={() => panel.current!.togglePopover()}
      >
        {name}
        {told !== "" && <span class="told">: {told}</span>}
      </button>
      <div
        ref={panel}
        popover="auto"
        class="popover"
        role="dialog"
        aria-label={name}
        onToggle={(event: Event) => {
          const now = (event as ToggleEvent).newState === "open";
          setOpen(now);
          if (!now) return;
          stand();
          panel.current!.querySelector<HTMLElement>('button[aria-pressed="true"]')?.focus();
        }}
        onKeyDown={(event) => {
          if (event.key !== "Escape") return;
          // Here it closes the menu and nothing else.
          event.stopPropagation();
          event.preventDefault();
          panel.current!.hidePopover();
          button.current!.focus();
        }}
      >
        {children}
      </div>
    </div>
  );
}
