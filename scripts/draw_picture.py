"""Draw a sample picture: a red circle above a blue square on a light ground.

python scripts/draw_picture.py OUT.png
"""

from pathlib import Path

import typer
from PIL import Image, ImageDraw


def main(out: Path = typer.Argument(help="The file to write; its ending picks the format.")) -> None:
    """Draw the sample picture that `make demo` looks at where no photograph is at hand."""
    picture = Image.new("RGB", (320, 240), "#f4efe4")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((110, 20, 210, 120), fill="#c62828")
    draw.rectangle((100, 140, 220, 220), fill="#1e4fa3")
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)


if __name__ == "__main__":
    typer.run(main)
