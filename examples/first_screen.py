"""Take the README's picture: the first screen of the viewer, of the causal model that ships with the package.

pip install "hookattn[view]" playwright      # and a Chromium
python examples/first_screen.py              # writes docs/overview.png
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import hookattn
from hookattn.demo.induction import BOS, example_tokens, load_pretrained
from hookattn.render import save_page

OUT = Path(__file__).resolve().parents[1] / "docs" / "overview.png"
LENGTH = 18  # tokens in the repeated segment: few enough that the text below is one line
MEASURED = "viewer.findings && viewer.findings.total > 0 && viewer.findings.done === viewer.findings.total"


def main() -> None:
    """Trace, write a page, photograph it."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    ids = example_tokens(0, length=LENGTH)
    tokens = ["bos" if i == BOS else str(i) for i in ids[0].tolist()]
    trace = hookattn.trace(load_pretrained(), ids, tokens=tokens, verify="full")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(save_page(trace, Path(folder) / "induction.html", theme="light"))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        # The page's policy forbids to run the text by which it is asked whether all heads are measured.
        view = {"width": 1280, "height": 800}
        page = browser.new_context(viewport=view, device_scale_factor=1.5, bypass_csp=True).new_page()
        page.goto(path.as_uri())
        page.wait_for_function(f"globalThis.viewer && {MEASURED}")
        page.wait_for_timeout(1500)
        page.screenshot(path=str(out))
        browser.close()
    print(f"wrote {out} ({out.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
