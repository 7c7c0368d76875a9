"""The viewer's module ends the colours of weights where the figures end them: the same arrays given to both."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import hookattn
from hookattn.render.scale import scale_end
from tests.render.test_scale import heads

BUNDLE = Path(hookattn.__file__).parent / "render" / "viewer" / "hookattn-viewer.js"
RUN = """
import { readFileSync } from "node:fs";
const [bundle, path] = process.argv.slice(2);
const { rangeOf, Slices } = await import(bundle);
const found = [];
for (const { name, rows, cols, first } of JSON.parse(readFileSync(`${path}/cases.json`, "utf8"))) {
  const bytes = readFileSync(`${path}/${name}.f64`);
  const data = new Float64Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  found.push(await rangeOf({ rows, cols, data }, first, new Slices()));
}
process.stdout.write(JSON.stringify(found));
"""


def cases() -> dict[str, tuple[np.ndarray, int | None]]:
    rng = np.random.default_rng(3)
    made = {
        f"{name} {n} {causal} {first}": (np.ma.filled(weights, np.nan), first)
        for n in (8, 17, 49, 128, 512)
        for causal in (True, False)
        for name, weights in heads(n, causal).items()
        for first in (None, 0)
    }
    signed = rng.normal(size=(40, 60)) * np.geomspace(1e-6, 1, 40)[:, None]
    made |= {"signed": (signed, 3), "wide": (np.full((1, 300), 1 / 300), 0), "zeros": (np.zeros((30, 30)), 0)}
    made |= {f"two digits {x}": (np.where(np.eye(30), x, x / 30) + np.eye(30, 30, 9)[::-1], None) for x in (0.07, 0.29)}
    return made


def test_both_end_at_the_same_weight(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node: the viewer's module runs in it")
    (tmp_path / "viewer.mjs").write_bytes(BUNDLE.read_bytes())
    (tmp_path / "run.mjs").write_text(RUN, "utf-8")
    asked = []
    for name, (weights, first) in cases().items():
        (tmp_path / f"{name}.f64").write_bytes(weights.astype(np.float64).tobytes())
        asked.append({"name": name, "rows": weights.shape[0], "cols": weights.shape[1], "first": first})
    (tmp_path / "cases.json").write_text(json.dumps(asked), "utf-8")
    command = [node, tmp_path / "run.mjs", tmp_path / "viewer.mjs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for case, range_ in zip(asked, json.loads(done.stdout), strict=True):
        weights, first = cases()[case["name"]]
        assert math.isclose(range_["end"], scale_end(weights, first), rel_tol=1e-9), case["name"]
        assert range_["high"] == np.nanmax(weights), case["name"]
