"""Damages good files at random, gives them to the readers of the package, and reports what happened.

python tests/programs/fuzz.py SEED COUNT READER...     COUNT cases of each reader; a line of JSON for each reader

It runs in a process of its own, with limited memory. Case i of a reader depends on the seed and i alone.
"""

import faulthandler
import gc
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from damage import damage_bytes, damage_json, damage_safetensors  # noqa: E402
from PIL import Image, features  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402

import train  # noqa: E402
from ldm import StableDiffusion, formats, images, sampling, training  # noqa: E402
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig  # noqa: E402
from ldm.dreambooth import Trainable  # noqa: E402
from ldm.errors import MAX_MESSAGE, InputError  # noqa: E402
from ldm.lora import LoRA  # noqa: E402
from ldm.settings import Settings  # noqa: E402
from ldm.tokenizer import BOS, EOS, Tokenizer, clip_vocabulary  # noqa: E402
from ldm.training import ClassPictures, TrainingState, checkpoint, continuity  # noqa: E402
from ldm.training.precision import Precision  # noqa: E402

MEMORY, SECONDS = 1 << 30, 5  # the most that a case may take
PROCESSES = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.system", "os.spawn"}
CODE = {"pickle.find_class", "socket.connect", "ctypes.dlopen"}  # nor does a file choose what is loaded

# Readers. Each makes good files in a folder, and yields functions: damage one of them, and read what there is.

Case = Callable[[random.Random], object]
GOOD = random.Random(0)  # for a file that is not damaged


def tiny_model() -> StableDiffusion:
    """The smallest Stable Diffusion that is one."""
    vocab, merges = clip_vocabulary()
    tokens = [*list(vocab)[: 512 + 20], BOS, EOS]
    last = len(tokens) - 1
    config = ModelConfig(
        unet=UNetConfig(channels=(4,), attention=(True,), blocks=1, heads=1, context_dim=4, norm_groups=2),
        vae=VAEConfig(channels=(4, 8), blocks=1, norm_groups=2),
        text=TextConfig(len(tokens), 8, width=4, mlp_width=4, layers=1, heads=1, pad_id=last),
        sample_size=4,
    )
    return StableDiffusion(config, Tokenizer({token: id for id, token in enumerate(tokens)}, merges[:20], 8, last))


def use(path: Path, good: ModelConfig, rng: random.Random) -> None:
    """Reads a model. Loads it and makes a picture too if its configuration is another one, and else now and then."""
    source = formats.read(path)
    source.sampling()
    if source.config == good and rng.random() < 0.8:
        return
    sd = StableDiffusion.load(path)
    sd.check_finite()
    side = sd.config.vae.factor * 4
    if side <= 64:
        sd.generate("a cat", steps=1, height=side, width=side, output="latent")


def damaged_file(path: Path, damage: Callable[[random.Random, bytes], bytes], read: Callable) -> Case:
    """A case that damages one file, reads, and puts the good file back. The good file can be read."""
    good = path.read_bytes()
    read(GOOD)

    def case(rng: random.Random) -> object:
        path.write_bytes(damage(rng, good))
        try:
            return read(rng)
        finally:
            path.write_bytes(good)

    return case


def as_text(damage: Callable[[random.Random, str], bytes]) -> Callable[[random.Random, bytes], bytes]:
    return lambda rng, content: damage(rng, content.decode())


def single(folder: Path) -> Iterator[Case]:
    sd, path = tiny_model(), folder / "model.safetensors"
    sd.save(path, metadata={"ldm.sampling": json.dumps({"sampler": "ddim", "steps": 5, "guidance_scale": 2.0})})
    yield damaged_file(path, damage_safetensors, lambda rng: use(path, sd.config, rng))


def ckpt(folder: Path) -> Iterator[Case]:
    sd, path = tiny_model(), folder / "model.ckpt"
    torch.save({"epoch": 3, "state_dict": sd.state(), "lr": [1e-4, {"a": (1, 2)}]}, path)

    def read(rng: random.Random) -> None:
        tensors = formats.open_tensors(path)[0]
        formats.differences(tensors, sd.state())
        formats.not_finite(tensors)

    yield damaged_file(path, damage_bytes, read)


def diffusers(folder: Path) -> Iterator[Case]:
    sd, path = tiny_model(), folder / "model"
    sd.save(path, "diffusers")
    for name in ("model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))):
        yield damaged_file(path / name, as_text(damage_json), lambda rng: use(path, sd.config, rng))
    scheduler = path / "scheduler" / "scheduler_config.json"
    yield damaged_file(scheduler, as_text(damage_json), lambda rng: use(path, sd.config, rng))


def shards(folder: Path) -> Iterator[Case]:
    sd, path = tiny_model(), folder / "model"
    sd.save(path, "diffusers")
    whole = path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = formats.open_tensors(whole)[0]
    names, weight_map = sorted(tensors), {}
    for i in range(2):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        formats.save_tensors(whole.with_name(file), {name: tensors[name] for name in names[i::2]}, {})
        weight_map |= {name: file for name in names[i::2]}
    whole.unlink()
    index = whole.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    yield damaged_file(index, as_text(damage_json), lambda rng: use(path, sd.config, rng))


def tokenizer(folder: Path) -> Iterator[Case]:
    good = tiny_model().tokenizer.plus("[V]", 2)
    good.save(folder / "old")
    (folder / "new").mkdir()
    merges = [list(pair) for pair in good.merges]
    (folder / "new" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": good.vocab, "merges": merges}}))
    for path in (*(folder / "old" / name for name in Tokenizer.FILES), folder / "new" / "tokenizer.json"):
        damage = damage_bytes if path.suffix == ".txt" else as_text(damage_json)

        def read(rng: random.Random, folder: Path = path.parent) -> None:
            Tokenizer.from_folder(folder)(["a photo of a cat"])

        yield damaged_file(path, damage, read)
    text = good.to_metadata()
    yield lambda rng: Tokenizer.from_metadata(damage_json(rng, text).decode(errors="replace"))(["a photo of a cat"])


class Bias(Trainable):
    """Trains a few parameters, so that its checkpoints are small."""

    def __init__(self, sd: StableDiffusion, settings: Settings):
        super().__init__(sd, settings, {name: p for name, p in sd.parameters().items() if "out.2" in name})


def checkpoints(folder: Path) -> Iterator[Case]:
    """Two checkpoints with right checksums, in most cases, of which the newest is damaged; then it is restored."""
    settings = Settings(use_ema=True, mixed_precision="fp16")
    precision, identity = Precision("fp16", torch.device("cpu")), continuity.Identity(settings)

    def new() -> TrainingState:
        return TrainingState(Bias(tiny_model(), settings), settings, precision, "")

    state = new()
    for state.step in (1, 2):
        for parameter in state.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        state.taken = state.ema.updates = state.step
        checkpoint.save(folder, state, identity.config, "{}\n")
    newest = folder / "checkpoint-000002"
    state = new()

    def read(rng: random.Random) -> None:
        if rng.random() < 0.9:
            names = [line[66:] for line in sums.decode().splitlines()]
            lines = [f"{checkpoint.sha256(newest / name)}  {name}\n" for name in names]
            (newest / "SHA256SUMS").write_text("".join(lines))
        try:
            path = newest
            if rng.random() < 0.5:  # named, or the latest one that is whole
                checkpoint.check_whole(path), checkpoint.check_fits(path, state)
            else:
                path = checkpoint.newest(folder, state)
            checkpoint.restore(path, state)
            assert 1 <= state.step <= 2**31 and all(p.isfinite().all() for p in state.parameters.values())
            for parameter in state.parameters.values():
                parameter.grad = torch.ones_like(parameter)
            state.optimizer.step()
            identity.check(path, checkpoint.load_state(path)["run"])
        finally:
            state.optimizer.state.clear()
            state.step = state.taken = 0
            (newest / "SHA256SUMS").write_bytes(sums)

    sums = (newest / "SHA256SUMS").read_bytes()
    yield damaged_file(newest / "state.json", as_text(damage_json), read)
    yield damaged_file(newest / "training.safetensors", damage_safetensors, read)
    yield damaged_file(newest / "trained.safetensors", damage_safetensors, read)
    yield damaged_file(newest / "metrics.jsonl", damage_bytes, read)

    def lie(rng: random.Random) -> None:
        (newest / "SHA256SUMS").write_bytes(damage_bytes(rng, sums))
        checkpoint.damaged(newest)
        (newest / "SHA256SUMS").write_bytes(sums)

    yield lie


def run_config(folder: Path) -> Iterator[Case]:
    settings = Settings(instance_prompt="a sks dog")
    identity = continuity.Identity(settings, global_batch=1, photographs={"a.png": "0" * 64}, launch=None)
    path = folder / "config.json"
    path.write_text(json.dumps(identity.config))
    yield damaged_file(path, as_text(damage_json), lambda rng: identity.check(folder, continuity.read_config(folder)))


VALUES = """"x" [] {} -1 1e999 nan true '' 0 1 8 0.5 1e3 1000000000 1979-05-27 [[1],[2]] {a.b.c=1} "\\u0000" """.split()
VALUES += ["2" * 50, "9" * 5000, "[" * 5000, f'"{"x" * 5000}"', f"[{'1,' * 5000}]", "", "= 1"]


def toml(folder: Path) -> Iterator[Case]:
    path = folder / "run.toml"
    path.write_bytes(train.TINY.read_bytes() + b'output_dir = "x"\n')

    def damage(rng: random.Random, content: bytes) -> bytes:
        lines = content.decode().splitlines()
        for _ in range(rng.choice([0, 1, 1, 2])):
            at = rng.randrange(len(lines))
            key = lines[at].partition("=")[0] or "[table]"
            key = rng.choice([key, key, key, ".".join("a" * 100), '"\\n"', "[a]", "[[a]]", "seed", "unknown"])
            lines[at] = f"{key} = {rng.choice(VALUES)}"
        text = "\n".join(lines).encode()
        return damage_bytes(rng, text) if rng.random() < 0.4 else text

    yield damaged_file(path, damage, lambda rng: training.parse(["--config", str(path)], train.TINY))


def prompts(folder: Path) -> Iterator[Case]:
    path, words = folder / "prompts.txt", tiny_model().tokenizer
    path.write_text("a photo of a cat\n\n  夜 on the beach, isn't it?  \r\n\U0001f600 \u0301\u202e\n", encoding="utf-8")

    def damage(rng: random.Random, content: bytes) -> bytes:
        if rng.random() < 0.3:
            letters = rng.choice(["a", " ", "\n", "é", "\U0010ffff", "\u0301", "\0", "'s", "<|endoftext|>", "\u2028"])
            content += (letters * rng.choice([100, 5_000, 20_000])).encode()
        return damage_bytes(rng, content)

    def read(rng: random.Random) -> None:
        found = sampling.read_prompts(Namespace(prompt=[], prompts_file=str(path), negative_prompt="", num_images=1))
        words(found[:4])
        sampling.contact_sheet.grid([(found[0], [Image.new("RGB", (8, 8))])])

    yield damaged_file(path, damage, read)


def manifest(folder: Path) -> Iterator[Case]:
    recipe = {"prompt": "a dog", "sampler": "ddim", "steps": 5, "guidance_scale": 2.0, "resolution": 32}
    recipe |= {"prediction": "eps", "model": "0" * 64}
    path = folder / "manifest.json"
    record = {**recipe, "seed": 0, "pictures": {"class-00000.png": 1, "class-00001.png": 2}}
    path.write_text(json.dumps(record))
    yield damaged_file(path, as_text(damage_json), lambda rng: ClassPictures(folder, 3, 0, recipe))


def pictures(folder: Path) -> Iterator[Case]:
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    rgba, exif = Image.fromarray(noise, "RGBA"), Image.Exif()
    exif[274] = 6
    modes = "PNG RGBA PNG P PNG I;16 JPEG RGB JPEG CMYK GIF P BMP RGB TIFF RGB TIFF I;16 WEBP RGBA ICO RGBA TGA RGB"
    modes += " PCX RGB DDS RGBA PPM RGB SGI RGB ICNS RGBA" + (" AVIF RGB" if features.check("avif") else "")
    words = (modes + (" JPEG2000 RGB" if features.check("jpg_2000") else "")).split()
    for i, (kind, mode) in enumerate(zip(words[::2], words[1::2], strict=True)):
        picture = rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode) if mode != "I;16" else None
        picture = picture or Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
        stream, options = io.BytesIO(), {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") else {}
        picture.save(stream, format=kind, **options)
        path = folder / f"{i}.{kind.lower()}"
        path.write_bytes(stream.getvalue())

        def read(rng: random.Random, path: Path = path) -> None:
            images.load_picture(images.read_picture(path), 16)

        yield damaged_file(path, damage_bytes, read)


def picture_text(folder: Path) -> Iterator[Case]:
    """The text of a PNG file, ours and A1111's form alone."""
    facts = {
        "prompt": 'a "cat", red:\n夜',
        "negative_prompt": "fog",
        "seed": 3,
        "sampler": "dpmpp_2m_karras",
        "steps": 5,
    }
    facts |= {"guidance_scale": 2.0, "eta": 0.0, "width": 32, "height": 32, "model_name": "a, b", "dtype": "bf16"}
    text = formats.picture_text.to_text(facts)
    for name, entries in {"ours": text, "theirs": {"parameters": text["parameters"]}}.items():
        info, path = PngInfo(), folder / f"{name}.png"

        def damage(rng: random.Random, content: bytes, entries: dict[str, str] = entries) -> bytes:
            info, stream = PngInfo(), io.BytesIO()
            for key, value in entries.items():
                changed = damage_bytes(rng, value.encode()).decode(errors="replace") * rng.choice([1, 1, 1, 9999])
                info.add_text(key, rng.choice([value, changed, rng.choice(VALUES)]), zip=rng.random() < 0.2)
            Image.new("RGB", (8, 8)).save(stream, format="PNG", pnginfo=info)
            return damage_bytes(rng, stream.getvalue()) if rng.random() < 0.3 else stream.getvalue()

        for key, value in entries.items():
            info.add_text(key, value)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)

        def read(rng: random.Random, path: Path = path) -> None:
            formats.picture_text.read_text(path)

        yield damaged_file(path, damage, read)


def loras(folder: Path) -> Iterator[Case]:
    """LoRAs under kohya's names with alpha, also with a token, and under peft's with what diffusers says of them."""
    sd = tiny_model()
    adapter = formats.Adapter({name: LoRA(layer, 2, 2.0).draw(0, name).pair() for name, layer in some(sd).items()})
    said = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 2}, "text_encoder.use_rslora": True})
    for name, tensors, metadata in (
        ("kohya", adapter.tensors(), formats.kohya_metadata(sd.config, adapter)),
        ("token", replace(adapter, tokens={"[V]": torch.ones(2, 128)}).bundle(), {}),
        ("peft", adapter.tensors_of_diffusers(), {"lora_adapter_metadata": said}),
    ):
        path = folder / f"{name}.safetensors"
        formats.save_tensors(path, tensors, metadata)

        def read(rng: random.Random, path: Path = path) -> None:
            sd.apply_lora(path)
            sd.remove_lora()

        yield damaged_file(path, damage_safetensors, read)


def some(sd: StableDiffusion) -> dict:
    """Some of the layers that a LoRA can change, so that the file is small."""
    return {name: layer for name, layer in sd.lora_layers().items() if "attn2" in name or "mlp" in name}


READERS = {reader.__name__: reader for reader in (single, ckpt, diffusers, shards, tokenizer, checkpoints)}
READERS |= {reader.__name__: reader for reader in (run_config, toml, prompts, manifest, pictures, picture_text, loras)}

# Watching


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def watch(case: Case, rng: random.Random, events: set[str]) -> str:
    """Runs a case. "read", "refused", or in other words what is wrong with it."""
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
    before, start = resident("VmRSS"), time.process_time()
    events.clear()
    answer = "read"
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        case(rng)
    except InputError as error:
        answer, said = "refused", str(error)
        if not said.isprintable() or not 0 < len(said) <= MAX_MESSAGE:
            return f"message {said!r}"
    except BaseException as error:
        return "".join(traceback.format_exception(error)[-4:])
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.process_time() - start, resident("VmHWM") - before
    if seconds > SECONDS:
        return f"{seconds:.1f} seconds"
    if grown > MEMORY:
        return f"{grown >> 20} MiB"
    return f"events {sorted(events)}" if events else answer


def main(seed: str, count: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    events: set[str] = set()
    watched, watching = PROCESSES | CODE, []
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    sys.addaudithook(lambda event, _: watching and event in watched and events.add(event))
    try:
        for name in names:
            (folder / name).mkdir()
            cases = list(READERS[name](folder / name))
            for case in cases:  # imports and caches are not the cases' own
                watch(case, random.Random(0), events)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, resource.RLIM_INFINITY))
            watching.append(True)
            answers: dict[str, Any] = {"reader": name, "cases": count, "read": 0, "refused": 0, "wrong": {}}
            start = time.perf_counter()
            for i in range(count):
                answer = watch(cases[i % len(cases)], random.Random(f"{seed} {name} {i}"), events)
                if answer in ("read", "refused"):
                    answers[answer] += 1
                else:
                    answers["wrong"][i] = answer
                if i % 500 == 0:
                    gc.collect()
            watching.clear()
            answers["seconds"] = round(time.perf_counter() - start, 1)
            print(json.dumps(answers), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] or list(READERS))
