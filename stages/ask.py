"""No stage: ask the served champion what a picture shows, for `make ask PICTURE=file.png`."""

from pathlib import Path

from pipeline.asking import address, ask, body, champion, example, fit, form, read, words
from stages import OUTPUTS, PREPARED, run


def main(picture: str) -> None:
    """Send a picture's file, or with an empty name the first test image, and print what the server says of it."""
    wanted = form(champion(OUTPUTS))
    if picture:
        pixels, done, told = *read(Path(picture), wanted), picture
    else:
        image, told = example(PREPARED)
        pixels, done = fit(image, wanted)
    answer = words(ask(address(), body(pixels)), wanted)
    print(f"{told}{f' ({done})' if done else ''}: {answer}")


if __name__ == "__main__":
    run(main)
