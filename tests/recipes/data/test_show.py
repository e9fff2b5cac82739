"""`data show`: the page has the samples as training gets them, needs nothing else, and no text can break it."""

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from gpt_oss_vision.cli import main
from gpt_oss_vision.recipes.data.check import Check
from gpt_oss_vision.recipes.data.findings import Findings, examine
from gpt_oss_vision.recipes.data.lock import lock_of, write_lock
from gpt_oss_vision.recipes.data.printable import printable
from gpt_oss_vision.recipes.data.rows import Row
from gpt_oss_vision.recipes.data.samples import IGNORE_INDEX, encode_row
from gpt_oss_vision.recipes.data.show import Choice, ShownSource, choose, distances, image_of, show_row
from gpt_oss_vision.recipes.data.show_page import page_of
from gpt_oss_vision.recipes.data.show_text import print_text
from gpt_oss_vision.recipes.data.sources.base import Source
from gpt_oss_vision.recipes.data.sources.opening import open_source

TOOL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
HOSTILE = "</i></span></div><script>document.title='run'</script>\u202e\u2067\x00\x1b[31m\x85\r\n<!-- ]]> & \"'"


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


ROWS: dict[str, dict[str, Any]] = {
    "two images": {
        "messages": [turn("user", "See <image> and <image>."), turn("assistant", "A cat.\nA dog 😀.")],
        "images": ["red.png", "grey.png"],
        "id": 7,
    },
    "thinking": {
        "messages": [
            *(turn("user", "First?"), turn("assistant", "One.", thinking="Dropped thought.")),
            *(turn("user", "Second?"), turn("assistant", "Two.", thinking="Kept thought.")),
        ]
    },
    "tools": {
        "messages": [
            *(turn("system", "Be brief."), turn("user", "Warm?"), turn("assistant", "", tool_calls=[TOOL])),
            *(turn("tool", "sunny", name="weather", tool_call_id="x"), turn("assistant", "Yes.")),
        ]
    },
    "hostile": {"messages": [turn("user", HOSTILE), turn("assistant", f"{HOSTILE}<img src=http://a.b/c onerror=x>")]},
    "right to left": {"text": "مرحبا بالعالم, كيف حالك؟"},
    "half of a pair as a key": {"text": "A cat.", "\ud800<b>": 1},
    "half of a pair": {"text": "A cat \ud800."},
    "video": {"text": "A cat.", "video": "<script>.mp4"},
    "missing": {"text": "A cat.", "image": "gone<b>.png"},
}


@pytest.fixture
def rows(folder: Path) -> Path:
    Image.new("L", (5, 40), 90).save(folder / "grey.png")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS.values())))
    return folder / "rows.jsonl"


def shown(path: Path, processor, seq_length: int = 4096, strangest: int = 20) -> ShownSource:
    """As `show_files`, in this process."""
    source = open_source(path)
    found = examine(source, processor).limited_to(seq_length, source)
    chosen = choose(found, source, processor, strangest)
    samples = {name: [show_row(source, choice, processor) for choice in each] for name, each in chosen.items()}
    return ShownSource(check=Check(source=source, found=found, seq_length=seq_length), samples=samples)


class Page(HTMLParser):
    """The text of each class of elements in each article, and all tags and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.articles: list[dict[str, str]] = []
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        assert not [name for name in values if name.startswith("on")]
        if tag == "article":
            self.articles.append({})
        if tag not in ("meta", "img", "br", "path", "rect"):
            self._open.append((tag, values.get("class") or tag))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect"):
            assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if any(tag == "article" for tag, _ in self._open):
            for _, name in self._open:
                self.articles[-1][name] = self.articles[-1].get(name, "") + data

    def article(self, line: int) -> dict[str, str]:
        (found,) = (each for each in self.articles if each["h4"].endswith(f"line {line}"))
        return found

    @property
    def images(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(base64.b64decode(each.partition(",")[2]))) for each in self.addresses]


def line_of(name: str) -> int:
    return [*ROWS].index(name) + 1


# --- the page


@pytest.mark.parametrize("name", ["two images", "thinking", "tools", "hostile", "right to left"])
def test_the_learned_text_of_the_page_is_that_of_the_labels(rows, processor, name):
    row = open_source(rows).row(line_of(name) - 1)
    sample = encode_row(row, processor)
    # The labels, but that of an earlier answer's end: the page shows the tokens of the input.
    learned = processor.tokenizer.decode(sample["input_ids"][1:][sample["labels"][:-1] != IGNORE_INDEX])
    article = Page(page_of([shown(rows, processor)])).article(line_of(name))
    if name == "right to left":  # the first token has no label, and is half of a letter
        assert article["learned"] == "\\x85" + learned[1:] and article["given"] == "\\xd9"
    else:
        assert article["learned"] == printable(learned)


def test_all_tokens_of_a_sample_are_on_the_page(rows, processor):
    row = open_source(rows).row(line_of("two images") - 1)
    ids = encode_row(row, processor)["input_ids"]
    article = Page(page_of([shown(rows, processor)])).article(line_of("two images"))
    whole = article["tokens"]
    for number in (1, 2):
        whole = whole.replace(
            f"{processor.num_image_tokens} visual tokens, image {number}",
            processor.image_token * processor.num_image_tokens,
        )
    assert whole == processor.tokenizer.decode(ids)
    assert article["visual"].count("visual tokens") == 2


def test_images_are_those_that_the_tower_receives(rows, processor):
    page = Page(page_of([shown(rows, processor)]))
    pixels = processor.image_processor([str(rows.with_name(name)) for name in ("red.png", "grey.png")])["pixel_values"]
    assert len(page.images) == 2
    for image, expected in zip(page.images, pixels, strict=True):
        again = processor.image_processor(image, do_resize=False)["pixel_values"][0]
        assert np.abs(np.asarray(again) - np.asarray(expected)).max() < 1e-6
    article = page.article(line_of("two images"))
    assert "12 × 9 RGB" in article["figcaption"] and "5 × 40 L" in article["figcaption"]


def test_the_picture_of_a_grey_tower_is_grey(folder, processor):
    import torch

    image = image_of(torch.zeros(1, 4, 6), processor)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (6, 4), 128)


def test_the_page_fetches_nothing_and_runs_no_script(rows, processor):
    source = page_of([shown(rows, processor)])
    page = Page(source)
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {*page.tags}
    assert "default-src 'none'" in source and "url(" not in source
    assert source.encode()  # no half of a surrogate pair
    assert not any(ord(each) < 32 and each != "\n" for each in source)
    assert not {*"\u202e\u2067\x85"} & {*source}


def test_channels_are_marked(rows, processor):
    page = Page(page_of([shown(rows, processor)]))
    thinking, tools = page.article(line_of("thinking")), page.article(line_of("tools"))
    assert {"turn analysis", "turn final"} < thinking.keys()
    assert "Kept thought." in thinking["turn analysis"] and "Two." in thinking["turn final"]
    assert "turn commentary" in tools and '{"city": "Rome"}' in tools["turn commentary"]
    assert "assistant to=functions.weather, commentary json" in tools["name"]


def test_what_is_left_out_is_named(rows, processor):
    page = Page(page_of([shown(rows, processor)]))
    assert "keys that are not read: id" in page.article(line_of("two images"))["out"]
    thinking = page.article(line_of("thinking"))
    assert thinking["out"].count("thinking of message") == 1
    assert "thinking of message 2: the chat template does not write it" in thinking["out"]
    assert "Dropped thought." not in thinking["tokens"]
    assert "keys that are not read: \\ud800<b>" in page.article(line_of("half of a pair as a key"))["out"]


@pytest.mark.parametrize(
    ("record", "left_out"),
    [
        ({"text": "A cat.", "system": "Be brief.", "meta": {}}, ("system", "meta")),
        ({"text": "A cat.", "messages": [turn("assistant", "A cat.")]}, ("text",)),
        ({"texts": [{"user": "What?", "assistant": "A cat.", "source": "vqa"}], "tools": None}, ("source of turns",)),
        ({"conversations": [{"from": "gpt", "value": "A cat."}], "system": "Be brief."}, ()),
    ],
)
def test_keys_that_are_not_read_are_kept_in_the_row(folder, record, left_out):
    (folder / "rows.jsonl").write_text(json.dumps(record))
    assert open_source(folder / "rows.jsonl").row(0).left_out == left_out


def test_rows_that_cannot_be_used_are_named_with_their_reasons(rows, processor):
    text = Page(page_of([shown(rows, processor)])).text
    assert "3 rows cannot be used" in text
    assert '"video" is not read' in text and "image gone<b>.png is missing" in text and "surrogates not allowed" in text


def test_an_image_that_is_cut_off_behind_its_header_is_a_problem_of_its_row(folder, processor):
    Image.effect_noise((64, 64), 60).save(folder / "cut.jpg")
    content = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "rows.jsonl").write_text(json.dumps({"text": "A cat.", "image": "cut.jpg"}))
    page = Page(page_of([shown(folder / "rows.jsonl", processor)]))
    assert "It cannot be used: image cut.jpg is broken" in page.article(1)["problem"]


def test_a_source_without_usable_rows_has_a_page(folder, processor):
    (folder / "rows.jsonl").write_text('{"text": ""}')
    page = Page(page_of([shown(folder / "rows.jsonl", processor)]))
    assert page.articles == [] and "1 rows cannot be used" in page.text


def test_a_long_text_is_cut_on_the_page_and_not_in_the_sample(folder, processor):
    text = "It is a cat. " * 8_000
    (folder / "rows.jsonl").write_text(json.dumps({"text": text}))
    source = shown(folder / "rows.jsonl", processor, seq_length=10**7)
    (sample,) = source.samples["Longest"]
    assert sample.tokens == len(processor.tokenizer.encode(text)) == sample.learned + 1
    assert sum(len(span.ids) for span in sample.spans) == sample.tokens
    page = page_of([source])
    (gap,) = (span for span in sample.spans if span.kind == "gap")
    assert f"{len(gap.ids):,} tokens in the middle are not shown here" in page and len(page) < 1_000_000


# --- which rows


class Counted(Source):
    """A million rows, which counts those that are read."""

    kind, files = "JSON", (Path("rows.jsonl"),)

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 1_000_000

    def row(self, index: int, *, for_training: bool = True) -> Row:
        self.read += 1
        return Row(text=f"It is a cat {index}." + "☃" * (index == 999_999))

    def place(self, index: int) -> tuple[str, int]:
        return "rows.jsonl", index + 1


def test_of_a_million_rows_few_are_read(processor):
    source, random = Counted(), np.random.default_rng(0)
    found = Findings.of_rows(range(len(source)))
    found.lengths[:] = random.integers(90, 110, len(source))
    found.learned[:], found.images[:], found.hashes[:] = found.lengths // 2, 1, np.arange(len(source))
    found.lengths[777], found.learned[777], found.images[123] = 4000, 2000, 40
    found.lengths[5] = 0
    chosen = choose(found, source, processor, 20)
    assert source.read <= 2000
    assert chosen["Longest"][0].row == 777
    by_row = {choice.row: choice.reason for choice in chosen["Strangest"]}
    assert by_row[123].startswith("images: 40, where the median is 1 (")
    assert by_row[999_999].startswith("rare characters: ")
    assert len(chosen["Strangest"]) == 20 and len(chosen["Spread evenly"]) >= 5
    rows = [choice.row for choices in chosen.values() for choice in choices]
    assert len({*rows}) == len(rows) and 5 not in rows


def test_of_repeated_rows_one_is_shown(folder, processor):
    (folder / "rows.jsonl").write_text('{"text": "A cat."}\n' * 30 + '{"text": "A dog, a dog."}')
    chosen = choose(examine(source := open_source(folder / "rows.jsonl"), processor), source, processor, 20)
    assert sorted(choice.row for choices in chosen.values() for choice in choices) == [0, 30]


def test_distances_are_robust():
    values = np.array([9.0, 10, 11, 10, 9, 11, 1000])
    assert distances(values)[:6].max() < 1 and distances(values)[6] > 100
    assert (distances(np.full(5, 3.0)) == 0).all()
    mostly = np.array([1.0] * 99 + [7])
    assert distances(mostly)[:99].max() == 0 < distances(mostly)[99]


class Tokens(Counted):
    """Rows of tokens, one of which no tokenizer has."""

    def row(self, index: int, *, for_training: bool = True) -> Row:
        return Row(tokens=np.array([40, 41, 10**6, 42]), shape="tokens")


def test_rows_of_tokens_are_shown_without_a_text_of_their_own(processor):
    sample = show_row(Tokens(), Choice(0, "spread evenly"), processor)
    assert (sample.tokens, sample.learned, sample.problem, sample.turns) == (4, 3, None, [""])
    assert [span.kind for span in sample.spans] == ["given", "learned", "learned", "learned"]
    assert sample.spans[2].text == "<no token 1000000>"


# --- the terminal


def text_of(source: ShownSource, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=60, **options)
    print_text(source, console)
    return console.file.getvalue()


def test_text_marks_what_is_learned_where_there_are_no_styles(rows, processor):
    text = text_of(shown(rows, processor))
    assert "<|start|>assistant⟦<|channel|>final<|message|>A cat.\nA dog 😀.<|return|>⟧" in text
    assert f"See [{processor.num_image_tokens} visual tokens, image 1] and" in text
    assert "image 2: grey.png, 5 x 40 L, to 8 x 8 RGB" in text
    assert "left out: thinking of message 2" in text
    assert not {*"\x1b\x00\u202e\ud800"} & {*text}


def test_on_a_terminal_the_styles_are_those_of_the_legend(rows, processor):
    text = text_of(shown(rows, processor), force_terminal=True, color_system="standard", _environ={"TERM": "xterm"})
    assert "⟦" not in text
    assert "\x1b[4;32m<|channel|>final<|message|>A cat." in text
    assert "\x1b[31m\x85" not in text  # that of the row


# --- the command


@pytest.fixture
def command(rows: Path, processor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`data show` in a folder of its own; the rows have a lock."""
    processor.save_pretrained(tmp_path / "processor")
    source = open_source(rows)
    write_lock(lock_of(rows), source, examine(source, processor), processor, decode_images=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return lambda *arguments: main(["data", "show", "--processor", str(tmp_path / "processor"), *map(str, arguments)])


def test_the_page_is_in_the_working_folder_and_may_be_written_again(command, rows, capsys):
    assert command(rows) == 0
    assert capsys.readouterr().out == "The samples are in rows.jsonl.html; open it in a browser.\n"
    first = Path("rows.jsonl.html").read_text()
    assert command(rows, "--rows", "0") == 0
    assert "Strangest</h3>" in first and "Strangest</h3>" not in Path("rows.jsonl.html").read_text()


def test_a_file_that_is_no_such_page_is_not_replaced(command, rows, capsys):
    Path("rows.jsonl.html").write_text("mine")
    assert command(rows) == 1
    assert "--out rows.jsonl.html exists; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert Path("rows.jsonl.html").read_text() == "mine"
    assert command(rows, "--overwrite") == 0
    assert Path("rows.jsonl.html").read_text().startswith("<!doctype html>")


def test_a_lock_is_taken_in_place_of_a_check(command, rows, capsys, monkeypatch):
    assert command(rows, "--text") == 0
    printed = capsys.readouterr()
    assert "Rows checked" not in printed.err and "of which 3 cannot be used" in printed.out
    rows.write_text(rows.read_text() + "\n\n")
    assert command(rows, "--text") == 1
    assert "run `gpt-oss-vision data check` again, or remove" in capsys.readouterr().err
    lock_of(rows).unlink()
    assert command(rows, "--text") == 0
    assert "Rows checked" in capsys.readouterr().err


def test_errors_are_sentences(command, rows, capsys):
    (rows.parent / "empty.jsonl").write_text("")
    for arguments, code, words in [
        ((rows, "--text", "-o", "a.html"), 2, "--out and --overwrite go with the page"),
        ((rows.parent / "empty.jsonl",), 1, "empty.jsonl is empty"),
        ((rows, "--recipe", "none"), 2, "none"),
        ((rows, "-o", "no/folder.html"), 1, "parent folder no of --out does not exist"),
    ]:
        assert command(*arguments) == code, arguments
        assert words in capsys.readouterr().err


def test_the_length_of_a_recipe_is_a_limit(command, rows, capsys):
    assert command(rows, "--text", "--recipe", "gpt_oss_vision_tiny_sft", "--rows", "0") == 0
    assert "tokens don't fit seq_length 32" in capsys.readouterr().out


def test_which_parts_are_learned_is_that_of_the_options(command, rows, capsys):
    lock_of(rows).unlink()
    assert command(rows, "--text", "--learned-turns", "last", "--learned-channels", "final") == 0
    text = capsys.readouterr().out
    assert text.count("⟦") - 1 == text.count("⟧") - 1 == 6  # one a row, and the legend
    assert "<|message|>Kept thought.<|end|><|start|>assistant⟦<|channel|>final<|message|>Two.<|return|>⟧" in text
    assert "<|start|>assistant<|channel|>final<|message|>One.<|end|>" in text


# --- a browser


@pytest.fixture
def browser() -> Callable[..., str]:
    """Debian's chromium without a window. CI must have it."""
    path = shutil.which("chromium")
    if path is None and not os.environ.get("CI"):
        pytest.skip("needs chromium")
    assert path is not None, "install Debian's chromium, as .ci/run does"

    def run(page: Path, *options: str) -> str:
        line = [path, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
        done = subprocess.run([*line, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run


def title_of(page: str) -> str:
    """That of the page, in front of those of figures."""
    return unescape(page.partition("<title>")[2].partition("</title>")[0])


def test_a_browser_shows_the_page_within_its_width(rows, processor, browser, tmp_path):
    """A script of the test writes what the browser has laid out into the title; the page itself may run none."""
    source = page_of([shown(rows, processor)])
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert policy in source
    script = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        width: document.documentElement.scrollWidth, articles: document.querySelectorAll("article").length,
        images: [...document.images].map(image => image.naturalWidth),
        scripts: document.scripts.length,
        learned: [...document.querySelectorAll("article .learned")].map(span => span.textContent),
    }) })</script>"""
    (tmp_path / "page.html").write_text(
        source.replace(policy, f"{policy}; script-src 'unsafe-inline'").replace("</body>", f"{script}</body>")
    )
    dom = browser(tmp_path / "page.html", "--window-size=500,900", "--virtual-time-budget=2000", "--dump-dom")
    found, page = json.loads(title_of(dom)), Page(source)
    assert found["width"] <= 500
    assert found["articles"] == len(page.articles) and found["scripts"] == 1
    assert found["images"] == [8, 8]
    assert "".join(found["learned"]) == "".join(article.get("learned", "") for article in page.articles)


def test_the_page_as_it_is_runs_nothing_in_a_browser(rows, processor, browser, tmp_path):
    (tmp_path / "page.html").write_text(page_of([shown(rows, processor)]))
    assert title_of(browser(tmp_path / "page.html", "--dump-dom")) == "rows.jsonl: samples"
    browser(tmp_path / "page.html", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,2000")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1280, 2000) and len(picture.convert("RGB").getcolors(10**7)) > 100
