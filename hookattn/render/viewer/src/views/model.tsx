import type { View } from "./index";
export const model: View = { id: "model", label: "model", help: "", fields: () => ["weights"], controls: [], component: () => null };
