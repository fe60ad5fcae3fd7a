"""Pictures of a run's report as its readers see it: on a desk, in the dark, on a phone.

python -m experiments.report_pictures --workdir=runs/tickets --out=docs/images

Needs Chromium (or Chrome), which draws the pages.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import PIL.Image
from absl import app, flags

from dp_rmt.finetuning import command_line

FLAGS = flags.FLAGS
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
COLORS = 256
"""Enough for text and lines; a picture of all colours is five times as large."""


class View(NamedTuple):
    """How a report is looked at.

    Attributes:
      width, height: of the window, in the units of its style sheet.
      scale: pixels for each of them.
      is_dark: whether the reader prefers dark pages.
    """

    width: int
    height: int
    scale: int = 1
    is_dark: bool = False


VIEWS = {
    "report_desk": View(1080, 1240),
    "report_dark": View(1080, 1240, is_dark=True),
    "report_phone": View(390, 1000, scale=2),
}


def take(report: Path, out: Path, browser: str) -> list[Path]:
    """Draws the beginning of a report in every view, and returns the files."""
    pictures = []
    for name, view in VIEWS.items():
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / "drawn.png"
            # A window is never narrower than a few hundred pixels; a frame in it is as narrow as a phone.
            frame = Path(folder) / "frame.html"
            style = f"border:0;width:{view.width}px;height:{view.height}px"
            frame.write_text(
                "<!DOCTYPE html><meta name='color-scheme' content='light dark'><body style='margin:0'>"
                f"<iframe src='{report.resolve().as_uri()}' style='{style}'>"
            )
            options = [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--allow-file-access-from-files",
                f"--window-size={max(view.width, 600)},{view.height}",
                f"--force-device-scale-factor={view.scale}",
                f"--blink-settings=preferredColorScheme={0 if view.is_dark else 1}",
                f"--screenshot={drawn}",
            ]
            subprocess.run([browser, *options, frame.as_uri()], check=True, capture_output=True, timeout=120)
            with PIL.Image.open(drawn) as image:
                cut = image.convert("RGB").crop((0, 0, view.width * view.scale, view.height * view.scale))
            path = out / f"{name}.png"
            cut.quantize(COLORS, dither=PIL.Image.Dither.NONE).save(path, optimize=True)
        pictures.append(path)
    return pictures


def main(argv: list[str]) -> None:
    """Takes the pictures."""
    del argv
    report, out = Path(FLAGS.workdir) / "report.html", Path(FLAGS.out)
    try:
        browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
        if browser is None:
            raise FileNotFoundError(f"no browser is found (looked for {', '.join(BROWSERS)}): install Chromium")
        if not report.is_file():
            raise FileNotFoundError(f"{report} does not exist: give the folder of a run")
        for path in take(report, out, browser):
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    except (OSError, subprocess.SubprocessError) as error:
        command_line.stop(error)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
    flags.DEFINE_string("out", "docs/images", "Folder of the pictures.")
    app.run(main)
