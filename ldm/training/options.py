"""Reads `Settings` from the command line and TOML files."""

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

from ldm.data import Words, fill, names_prompts, with_subjects_of_folders, words_of
from ldm.errors import InputError
from ldm.runtime import check_path, cli, read_toml
from ldm.settings import LORA_RATE, LOW_LORA_RATE, Settings, flag, read_tables, run_of

FIRST = (  # the flags at the top of --help
    "model",
    "instance_data_dir",
    "instance_prompt",
    "class_prompt",
    "output_dir",
    "resolution",
    "max_train_steps",
    "learning_rate",
    "lora_rank",
    "mixed_precision",
)


def parse(argv: Sequence[str] | None, tiny: Path) -> Settings:
    """The settings of a command line: defaults, overridden by `tiny` if no model is given, by --config, and by flags.

    tiny: TOML file with the settings of the embedded model. Raises InputError for unknown flags and keys, values of the
    wrong type, and settings that do not go together.
    """
    given = vars(_parser().parse_args(argv))
    config = given.pop("config", None)
    from_file = _read_toml(Path(config)) if config else {}
    is_tiny = "model" not in given and "model" not in from_file
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    named = (_of_tiny(tiny, from_file | given) if is_tiny else {}) | from_file | given
    if config and "output_dir" not in named and (run := run_of(Path(config))):
        resume = named.get("resume_from_checkpoint")
        if resume is not None and not os.path.exists(resume):  # "latest", or the name of a checkpoint in that run
            named["output_dir"] = str(run)
    settings = Settings(**named)
    for f in fields(Settings):
        if f.metadata["path"] and (path := getattr(settings, f.name)) is not None:
            check_path(path, flag(f.name))
    settings = _with_words(with_subjects_of_folders(settings))
    if problem := settings.problems():
        raise InputError(problem)
    for doubt in _doubts(settings, given):
        warnings.warn(doubt, stacklevel=2)
    return settings


# Settings, when they have no effect, and the words for that.
WITHOUT_EFFECT = (
    (("lora_alpha", "lora_targets", "lora_conv_rank"), lambda s: not s.lora_rank, "without --lora-rank"),
    (("num_vectors", "token_learning_rate"), lambda s: not s.placeholder_token, "without --placeholder-token"),
    (("initializer_token",), lambda s: not s.placeholder_token and s.class_prompt, "without --placeholder-token"),
    (("text_encoder_learning_rate",), lambda s: not s.train_text_encoder, "with --no-train-text-encoder"),
    (
        ("text_encoder_learning_rate", "text_encoder_stop_step"),
        lambda s: s.train == "token" and s.train_text_encoder,
        "with --train token",
    ),
    (
        ("text_encoder_stop_step",),
        lambda s: not s.train_text_encoder and not s.placeholder_token,
        "with --no-train-text-encoder",
    ),
    (("learning_rate",), lambda s: s.train == "token", "with --train token; --token-learning-rate does"),
    (("ema_decay",), lambda s: not s.use_ema, "without --use-ema"),
    (("huber_c",), lambda s: s.huber is None, "without --loss huber"),
    (("prior", "prior_loss_weight"), lambda s: not s.with_prior_preservation, "without a prior term"),
    (
        ("num_class_images", "class_data_dir"),
        lambda s: not s.uses_class_pictures,
        "with --prior prediction or without a prior term",
    ),
    (
        ("layout",),
        lambda s: s.lora_rank or s.train == "token",
        "on a LoRA or a token: each is one file, which all programs read",
    ),
)


def _doubts(settings: Settings, given: dict[str, Any]) -> Iterator[str]:
    """Settings that are possible, and hardly what the user wants. given: by flags; a file can serve several runs."""
    if settings.lora_rank and settings.learning_rate < LOW_LORA_RATE:
        yield f"--learning-rate {settings.learning_rate:g} is low for a LoRA; {LORA_RATE:g} is usual"
    usual = Settings(train=settings.train)
    for names, is_idle, how in WITHOUT_EFFECT:
        for name in names:
            if name in given and getattr(settings, name) != getattr(usual, name) and is_idle(settings):
                yield f"{flag(name)} has no effect {how}"


def _of_tiny(tiny: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the embedded model, without those that do not suit what is given.

    Its prompts are left out if other subjects are given with theirs; its held-out pictures for any other photographs.
    A LoRA has settings of its own, lora.toml beside `tiny`; their rank of convolutions only where these train.
    """
    known, folder, left_out = _read_toml(tiny), given.get("instance_data_dir"), set()
    if "lora_rank" in given:
        known |= _read_toml(tiny.with_name("lora.toml"))
        if given.get("lora_targets", "all") != "all":
            left_out.add("lora_conv_rank")
    if "subjects" in given or (folder and "instance_prompt" not in given and names_prompts(Path(folder))):
        left_out |= {"instance_data_dir", "instance_prompt", "class_prompt", "validation_prompt"}
    elif "instance_prompt" in given:
        left_out.add("validation_prompt")  # it shows the embedded subject
    if "subjects" in given or folder or given.get("hold_out"):
        left_out.add("validation_data_dir")
    return {name: value for name, value in known.items() if name not in left_out}


def _with_words(settings: Settings) -> Settings:
    """Fills in {token} and {class} in the prompts; a validation prompt that holds them becomes one for each subject."""

    def words(prompt: str | None, class_prompt: str | None) -> Words:
        return words_of(prompt or "", class_prompt, settings.placeholder_token, settings.initializer_token)

    def filled(group: Any, where: str = "") -> Any:
        known = words(group.instance_prompt, group.class_prompt)
        texts = {name: getattr(group, name) for name in ("instance_prompt", "class_prompt")}
        texts = {name: fill(text, known, f"{where}{flag(name)}") for name, text in texts.items() if text}
        return replace(group, **texts)

    several = tuple(filled(subject, f"subject {subject.name!r}: ") for subject in settings.subjects)
    settings = replace(filled(settings), subjects=several)
    shown = [
        fill(prompt, words(subject.instance_prompt, subject.class_prompt), "--validation-prompt")
        for prompt in settings.validation_prompt
        for subject in settings.taught
    ]
    return replace(settings, validation_prompt=tuple(dict.fromkeys(shown)))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="train.py",
        usage="train.py [--config FILE.toml] [flags]",
        description="DreamBooth: teaches a Stable Diffusion one subject from a few photographs.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="settings by their names below; flags override them")
    known = {f.name: f for f in fields(Settings)}
    _add(parser, known["dry_run"])
    groups = {"What most people need first": [known[name] for name in FIRST]}
    groups |= {group.__doc__: settings for group, settings in Settings.groups()}
    shown = {"dry_run"}
    for title, settings in groups.items():
        section = parser.add_argument_group(title)
        for f in settings:
            if f.name not in shown and not f.metadata["in_file_only"]:
                _add(section, f)
                shown.add(f.name)
    return parser


def _add(section: Any, f: Field) -> None:
    """Adds the flag of a setting to a section of --help."""
    meta, options = f.metadata, dict(f.metadata["options"])
    if isinstance(f.default, bool):
        options.setdefault("action", argparse.BooleanOptionalAction)
    elif "type" not in options and isinstance(f.default, int | float):
        options["type"] = type(f.default)
    if not isinstance(f.default, bool) and "choices" not in options:
        options.setdefault("metavar", "PATH" if meta["path"] else METAVARS.get(options.get("type"), "TEXT"))
    is_plain = f.default in (None, ()) or options.get("action") == "store_true"
    shown = "" if is_plain else f" (default: {f.default})"
    section.add_argument(flag(f.name), *meta["flags"], dest=f.name, help=meta["help"] + shown, **options)


METAVARS = {int: "N", cli.positive: "N", float: "X"}  # argparse type -> what --help shows for a value
TYPES = {cli.positive: int, float: float}  # argparse type -> type of a setting without a default


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tree = read_toml(path)
    except InputError as error:
        raise InputError(f"--config {error}") from None
    known = {f.name: f for f in fields(Settings)}
    known |= {_key(flag): f for f in fields(Settings) for flag in f.metadata["flags"]}
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        if (f := known.get(_key(key))) is None:
            nearest = cli.did_you_mean(key, [f.name for f in fields(Settings)])
            raise InputError(f"--config {path}: {key}: {nearest or 'there is no such setting; --help lists them'}")
        if f.name == "subjects":
            settings[f.name] = read_tables(f"--config {path}", value, path.parent)
            continue
        settings[f.name] = _checked(f"--config {path}: {key}", f, value, path.parent)
    return settings


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _checked(where: str, f: Any, value: Any, folder: Path) -> Any:
    """The value of one key, which must have the type of the setting's default. folder: of the TOML file."""
    kind = TYPES.get(f.metadata["options"].get("type"), str) if f.default is None else type(f.default)
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{where} is not a list of strings")
        return tuple(value)
    if kind is float and type(value) is int and abs(value) <= cli.MAX_COUNT:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{where} is {value!r}, and should be a {kind.__name__}")
    options = f.metadata["options"]
    if options.get("type") is cli.positive and not 1 <= value <= cli.MAX_COUNT:
        raise InputError(f"{where} is {value}, and should be from 1 to {cli.MAX_COUNT}")
    if "choices" in options and value not in options["choices"]:
        raise InputError(f"{where} is {value!r}; there are {', '.join(options['choices'])}")
    may_be_a_name = f.name in ("model", "resume_from_checkpoint")  # "latest", or a name on a hub
    if f.metadata["path"] and (not may_be_a_name or os.path.exists(folder / value)):
        return str(folder / value)
    return value
