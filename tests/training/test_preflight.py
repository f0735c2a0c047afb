"""What train.py says before it begins: the prompts, the photographs, the work to do."""

import io
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from runs import SMALL, call, command, photograph, run

from ldm import images
from ldm.data import Example, Subject
from ldm.preflight.note import Note, listed
from ldm.preflight.photographs import ALIKE, fingerprint, photograph_notes
from ldm.preflight.preflight import (
    class_note,
    disk_notes,
    held_out_notes,
    resolution_notes,
    steps_note,
    subject_notes,
    trains_note,
)
from ldm.preflight.prompts import prompt_notes
from ldm.settings import Settings
from ldm.tokenizer import Tokenizer
from ldm.training import ClassPictures, distinct_class_pictures, log, pace, tuning_of
from ldm.training.tracking import Tracker


def notes_of(instance: str, class_prompt: str | None = "a photo of a dog", **settings: object) -> dict[str, list[str]]:
    """The texts of the notes on prompts in CLIP's vocabulary, by topic; a warning begins with an exclamation mark."""
    given = replace(Settings(), **settings)
    tokenizer = Tokenizer.clip()
    if given.placeholder_token:
        tokenizer = tokenizer.plus(given.placeholder_token, given.num_vectors)
    found: dict[str, list[str]] = {}
    for note in prompt_notes(Subject("subject", [], instance, class_prompt), given, tokenizer):
        found.setdefault(note.topic, []).append(("! " if note.warning else "") + note.text)
    return found


def test_the_identifier_is_shown_as_clip_reads_it():
    """The numbers are those of tests/facts/tokenizer.json, which openai/CLIP's tokenizer gave."""
    assert notes_of("a photo of ohwx dog")["identifier"] == [
        '"ohwx" is one token, number 47,993 of 49,408; later tokens are rarer.'
    ]
    shown, warning = notes_of("a photo of zwx dog")["identifier"]
    assert shown == '"zwx" is 2 tokens of the 49,408: z (89) and wx (3,561).'
    assert warning.startswith('! "zwx" is of several tokens')
    shown, warning = notes_of("a photo of sks dog")["identifier"]
    assert "number 48,136 of 49,408" in shown and warning.startswith("!") and "rifle" in warning


@pytest.mark.parametrize("word", ["my", "cute", "luna", "monster"])
def test_a_frequent_word_is_warned_of(word):
    _, warning = notes_of(f"a photo of {word} dog")["identifier"]
    assert warning.startswith(f'! "{word}" is frequent')


def test_one_rare_word_among_others_is_enough_and_none_is_too_few():
    assert len(notes_of("a photo of olis dog in the garden")["identifier"]) == 1
    for prompt in ("a photo of a dog", "A photo of the dog."):
        (warning,) = notes_of(prompt)["identifier"]
        assert warning.startswith("! ") and "no word names your subject" in warning


def test_a_new_token_is_its_own_identifier():
    token = {"placeholder_token": "[V]", "initializer_token": "dog", "num_vectors": 3}
    assert notes_of("a photo of [V]", None, **token) == {
        "identifier": ['"[V]" is a new token of 3 vectors, begun as "dog".']
    }
    assert notes_of("a photo of [V]", **token).keys() == {"identifier"}  # and carries the class already


def test_the_instance_prompt_should_name_the_class():
    assert notes_of("a photo of olis dog")["prompts"] == ['"a photo of olis dog" names the class, "dog".']
    (warning,) = notes_of("a photo of olis")["prompts"]
    assert warning.startswith("! ") and 'does not name the class, "dog"' in warning
    (partly,) = notes_of("a photo of olis dog", "a photo of a small dog")["prompts"]
    assert partly.endswith("but not small.")
    assert "prompts" not in notes_of("a photo of olis dog", None)


def test_another_vocabulary_than_clips_is_shown_without_warnings(random_model):
    (first, _) = prompt_notes(Subject("subject", [], "a sks dog", "a dog"), Settings(), random_model().tokenizer)
    assert first.topic == "identifier" and not first.warning


# Photographs


def scene(seed: int, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """A smooth picture, as a photograph is."""
    noise = torch.randint(256, (6, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)


def picture(name: str, image: Image.Image, format: str = "PNG", **options: object) -> images.Picture:
    content = io.BytesIO()
    image.save(content, format, **options)
    return images.Picture(SimpleNamespace(name=name), content.getvalue())


def photograph_texts(side: int, **pictures: Image.Image) -> list[str]:
    notes = photograph_notes([picture(name, image) for name, image in pictures.items()], [(side, side)] * len(pictures))
    return [("! " if note.warning else "") + note.text for note in notes]


def test_photographs_are_counted_and_measured():
    assert photograph_texts(64, a=scene(1), b=scene(2)) == [
        "2 photographs of 400 x 300 pixels; cutting them square removes 25 % of each."
    ]
    sizes, small, cut = photograph_texts(300, a=scene(1), b=scene(2, (200, 200)), c=scene(3, (900, 300)))
    assert sizes == "3 photographs from 200 x 200 to 900 x 300 pixels; cutting them square removes 0 to 67 % of each."
    assert small.startswith("! Too small,") and "b (200 x 200)." in small
    assert cut.startswith("! The cut removes much of c (67 %).") and cut.endswith("or give --aspect-ratio-buckets.")
    assert "removes nothing" in photograph_texts(64, a=scene(1, (64, 64)))[0]


@pytest.mark.parametrize("seed", range(2))
def test_the_same_photograph_twice_is_found_and_two_photographs_are_not(seed):
    first = scene(seed)
    changed = {
        "smaller": first.resize((200, 150)),
        "brighter": ImageEnhance.Brightness(first).enhance(1.15),
        "cut": first.crop((4, 3, 396, 297)),
        "jpeg": Image.open(io.BytesIO(picture("", first, "JPEG", quality=40).content)),
    }
    for name, other in changed.items():
        last = photograph_texts(64, a=first, **{name: other})[-1]
        assert last.startswith("! Nearly the same picture twice") and f"a = {name}" in last
    for other in (scene(seed + 10), ImageOps.mirror(first)):
        assert len(photograph_texts(64, a=first, b=other)) == 1


def test_a_photograph_on_its_side_and_a_large_jpeg_are_looked_at_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    large = scene(5, (1603, 1201))
    turned = fingerprint(picture("", large, "JPEG", exif=exif.tobytes()))
    upright = fingerprint(picture("", large.transpose(Image.Transpose.ROTATE_270)))
    assert (turned != upright).sum() <= 3 < ALIKE < (turned != fingerprint(picture("", large))).sum()


def test_photographs_that_are_cut_to_several_sizes_lose_less():
    pictures = [picture("a", scene(1)), picture("b", scene(2, (300, 400)))]
    (note,) = photograph_notes(pictures, [(72, 56), (56, 72)])
    assert note.text == "2 photographs from 300 x 400 to 400 x 300 pixels; cutting them to 2 sizes removes 4 % of each."
    *_, cut = photograph_notes([picture("a", scene(3, (900, 100)))], [(128, 32)])
    assert cut.text == "The cut removes much of a (56 %). Cut them around the subject yourself."


def test_every_kind_of_picture_is_looked_at(tmp_path):
    for mode in ("1", "L", "P", "RGBA", "I;16", "CMYK"):
        image = scene(1) if mode != "I;16" else scene(1).convert("L").convert("I")
        fingerprint(picture(mode, image if mode == "I;16" else image.convert(mode), "TIFF"))


def test_notes_on_one_of_several_subjects_begin_with_its_name(random_model):
    dog = Subject("dog", [Example(picture("a", scene(1)), "a sks dog")] * 2, "a sks dog", "a dog")
    settings = replace(Settings(), resolution=16)
    named, plain = (subject_notes(dog, settings, random_model(), is_named) for is_named in (True, False))
    assert [note.text for note in named] == [f"dog: {note.text}" for note in plain]
    assert [note.topic for note in plain] == ["identifier", "prompts", "photographs", "photographs"]
    assert [note.warning for note in named] == [note.warning for note in plain] == [False, False, False, True]


# The work to do


def subject(name: str, photographs: int, weight: float = 1.0, repeats: int = 1) -> Subject:
    return Subject(name, [Example(None, "", repeats=repeats)] * photographs, "", weight=weight)


def test_the_steps_are_counted_in_passes_over_the_photographs():
    settings = replace(Settings(), max_train_steps=100, train_batch_size=2, gradient_accumulation_steps=3)
    assert steps_note(settings, [subject("dog", 5)], 2).text == (
        "100 steps = 240 passes over the 5 photographs. A step takes 12 of them and as many class pictures "
        "(batch of 2 x 3 accumulated x 2 processes)."
    )
    alone = replace(settings, with_prior_preservation=False, gradient_accumulation_steps=1, max_train_steps=1)
    text = "1 step = 0.4 passes over the 5 photographs. A step takes 2 of them."
    assert steps_note(alone, [subject("dog", 5)], 1).text == text
    several = [subject("dog", 5, weight=3.0), subject("cat", 1, repeats=10)]  # 150 and 50 rows
    text = "100 steps = 30 passes over the 5 photographs of dog and 5 passes over the 1 photograph of cat."
    assert steps_note(replace(alone, max_train_steps=100), several, 1).text.startswith(text)


def test_class_pictures_are_counted_and_no_minutes_are_invented():
    some = [SimpleNamespace(missing=lambda: ["x"] * 10, paths=["x"] * 400) for _ in range(3)]
    assert class_note(Settings(), some).text.startswith("30 of 1,200 are still to make, in 50 sampling steps each.")
    assert class_note(Settings(), [SimpleNamespace(missing=list, paths=["x"] * 2)]).text == "All 2 are there."
    assert "no prior" in class_note(replace(Settings(), with_prior_preservation=False), []).text
    assert "own prediction" in class_note(replace(Settings(), prior="prediction"), []).text


def test_class_pictures_that_subjects_share_are_counted_once(tmp_path):
    recipe = dict.fromkeys(("prompt", "sampler", "steps", "guidance_scale", "resolution", "prediction", "model"))
    a, b, c = (ClassPictures(tmp_path / name, count, 0, recipe) for name, count in (("x", 3), ("y", 2), ("x", 5)))
    assert distinct_class_pictures([a, b, c]) == [c, b] and distinct_class_pictures([a]) == [a]


def test_held_out_pictures_are_counted_and_their_folder_is_named():
    given = replace(Settings(), validation_data_dir="weights/tiny/validation")
    assert [note.text for note in held_out_notes(given, 4)] == ["4 held-out pictures from tiny/validation."]
    assert held_out_notes(Settings(), 1)[0].text == "1 held-out picture from the photographs."
    assert held_out_notes(Settings(), 0) == []


def test_another_resolution_than_the_models_own_is_warned_of():
    assert resolution_notes(Settings(), 512) == []
    (note,) = resolution_notes(Settings(), 768)
    assert note.warning and "--resolution 768" in note.text


@pytest.mark.parametrize(("every", "limit", "most"), [(500, None, 1), (100, None, 8), (100, 2, 3), (400, 2, 2)])
def test_the_disk_holds_the_checkpoints_that_are_kept_and_the_result(every, limit, most, tmp_path, monkeypatch):
    settings = replace(Settings(), max_train_steps=400 if every == 500 else 800, checkpointing_steps=every,
                       checkpoints_total_limit=limit)  # fmt: skip
    state = SimpleNamespace(bytes_saved=10**9, trainable=SimpleNamespace(bytes_saved=lambda: 3 * 10**9))
    monkeypatch.setattr("ldm.preflight.preflight.free_space", lambda folder: (most + 3) * 10**9 - 1)
    run = SimpleNamespace(settings=settings, folder=tmp_path / "new" / "run")
    text, warning = disk_notes(run, state, [])
    assert text.text.startswith(f"The run fills at most {most + 3}.0 GB, {most}.0 of it with {most} checkpoint")
    assert warning.warning
    run.settings = replace(settings, validation_steps=10, hold_out=1)  # and the best model
    assert disk_notes(run, state, [])[0].text.startswith(f"The run fills at most {most + 6}.0 GB")
    monkeypatch.undo()
    state = SimpleNamespace(bytes_saved=50_000, trainable=SimpleNamespace(bytes_saved=lambda: 2_000_000))
    small = disk_notes(SimpleNamespace(settings=Settings(), folder=tmp_path), state, [])[0].text
    assert small.startswith("The run fills at most 2.1 MB, 0.10 of it with 2 checkpoints")  # a token or a LoRA
    assert len(disk_notes(run, SimpleNamespace(bytes_saved=1, trainable=SimpleNamespace(bytes_saved=int)), [])) == 1


def test_a_note_is_aligned_and_on_lines_that_fit_and_shows_nothing_that_moves_the_cursor():
    shown = str(Note("topic", "word " * 60 + "\x1b[2J", warning=True)).splitlines()
    assert shown[0].startswith("topic           warning: word word") and max(map(len, shown)) <= 120
    assert all(line.startswith(" " * 16) for line in shown[1:]) and "\x1b" not in "".join(shown)
    assert listed("abcdef") == "a, b, c and 3 more" and listed("abcd") == "a, b, c and d" and listed("a") == "a"


# The time that it takes


@pytest.mark.parametrize(
    ("each", "at", "left"), [(1.0, 12, "40 steps"), (0.1, 12, "40 steps"), (20.0, 3, "1 step"), (20.0, 3, "4 steps")]
)
def test_the_time_left_is_said_once_after_the_first_steps(each, at, left):
    """The first two steps are slow, and do not count."""
    total = at + int(left.split()[0])
    said, timer = {}, pace.Pace(total)
    for step in range(1, total + 1):
        if text := timer.after(step, 100.0 if step < 3 else each):
            said[step] = text
    assert said == {at: f"about {pace.duration(each * (total - at))} of training left: {left} of {each:.2g} s"}


def test_durations_are_said_in_the_unit_that_suits():
    given = {
        0.3: "1 second",
        1.2: "1 second",
        45: "45 seconds",
        100: "2 minutes",
        3000: "50 minutes",
        9000: "2.5 hours",
    }
    assert {seconds: pace.duration(seconds) for seconds in given} == given


# The program


def small_run(saved, folder, name: str = "run") -> list[object]:
    photos = folder / "photographs"
    return ["--model", saved["official"], "--instance-data-dir", photos if photos.exists() else photograph(photos),
            *SMALL, "--output-dir", folder / name, "--max-train-steps", 1]  # fmt: skip


def test_a_run_says_it_first_and_keeps_it_and_a_dry_run_says_the_same_and_writes_nothing(
    saved, tmp_path, capsys, monkeypatch
):
    given, free = small_run(saved, tmp_path), r"[\d.]+ GB are free"  # which changes meanwhile
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    call(*given[: given.index("--output-dir")], "--dry-run")  # in the next numbered folder
    assert capsys.readouterr().out.splitlines()[-1] == "dry run: nothing was written"
    call(*given, "--dry-run")
    dry = re.sub(free, "", capsys.readouterr().out).splitlines()
    assert sorted(tmp_path.rglob("*")) == before

    call(*given)
    real = re.sub(free, "", capsys.readouterr().out).splitlines()
    assert dry[:-1] == real[: len(dry) - 1] and real[-3].startswith("model: ")
    notes = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert all(note.keys() == {"topic", "text", "warning"} for note in notes)
    topics = [note["topic"] for note in notes]
    known = {"identifier", "prompts", "photographs", "trains", "class pictures", "steps", "disk", "memory"}
    assert known <= set(topics)
    assert " ".join(re.sub(free, "", notes[-1]["text"]).split()) in " ".join(" ".join(real).split())


def test_what_trains_is_said_by_network(random_model):
    settings = Settings(lora_rank=2, lora_targets="all", lora_conv_rank=1)
    groups = tuning_of(random_model(), settings).parameter_groups(settings)
    count = {group["name"]: sum(parameter.numel() for parameter in group["params"]) for group in groups}
    assert trains_note(settings, groups).text == (
        f"LoRA of rank 2, 1 in 3x3 convolutions. UNet: {count['unet']:,} numbers at a learning rate of 0.0001; "
        f"text encoder: {count['text encoder']:,} numbers at a learning rate of 5e-05."
    )
    assert "LoRA" not in trains_note(Settings(), groups).text


@pytest.mark.slow
def test_a_dry_run_of_two_processes_says_it_once(saved, tmp_path):
    done = run(command([*small_run(saved, tmp_path), "--dry-run"], processes=2), tmp_path / "log")
    assert done.out.count("memory ") == 1 and "processes" in done.out and not (tmp_path / "run").exists()


def test_the_time_left_is_printed_while_it_trains(capsys, tmp_path):
    numbers = SimpleNamespace(read=lambda: {"signals": 0.0, "loss": 1.0, "grad_norm": 1.0})
    bar = log.tqdm(total=20, disable=True)
    reporter = log.Reporter(bar, log.Log(tmp_path, "", "", Tracker("none", tmp_path, {})), 1)
    for step in range(1, 21):
        reporter.add(numbers, {"step": step, "began": time.perf_counter()})
        reporter.finish()
        time.sleep(0.01)  # a validation, which is no part of the step
    (each,) = re.fullmatch(r"about .* of training left: 8 steps of (.*) s\n", capsys.readouterr().out).groups()
    assert float(each) < 0.01
