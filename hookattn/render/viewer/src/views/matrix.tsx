import type { View } from "./index";
export const matrix: View = { id: "matrix", label: "matrix", help: "", fields: () => ["weights"], controls: [], component: () => null };
