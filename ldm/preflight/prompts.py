"""Notes on the prompts: how the tokenizer reads the identifier, and whether the instance prompt names the class.

DreamBooth ties the subject to a rare word, the identifier, "sks" in "a photo of sks dog" (Ruiz et al. 2023, section
3.1). A frequent word has a meaning already, and so have the pieces of a word that is more than one token.
"""

from ldm.data import FILLERS, Subject, identifier, words
from ldm.preflight.note import Note, counted, listed
from ldm.settings import Settings
from ldm.tokenizer import Tokenizer, clip_vocabulary

TOPIC = "identifier"
Pieces = dict[str, list[tuple[int, str]]]  # word -> the numbers and texts of its tokens

RARE = 40_000  # CLIP's tokens from this number on are rare: merges that were frequent in its texts come first


def prompt_notes(subject: Subject, settings: Settings, tokenizer: Tokenizer) -> list[Note]:
    """tokenizer: the model's, with the placeholder token if there is one."""
    class_prompt = subject.class_prompt or settings.class_prompt or ""
    token = settings.placeholder_token
    if token is not None and token.lower() in subject.prompt.lower():
        vectors = counted(len(tokenizer.ids(token)), "vector")
        return [Note(TOPIC, f'"{token}" is a new token of {vectors}, begun as "{settings.initializer_token}".')]
    if not class_prompt:
        notes = [Note(TOPIC, "It is not known: there is no class prompt to compare the instance prompt with.")]
    else:
        notes = _of_identifier(identifier(subject.prompt.lower(), class_prompt.lower()), tokenizer)
    return [*notes, *_of_class_word(subject.prompt, class_prompt)]


def _of_identifier(found: list[str], tokenizer: Tokenizer) -> list[Note]:
    if not found:
        text = "The instance prompt says no more than the class prompt: no word names your subject. Add a rare one."
        return [Note(TOPIC, text, warning=True)]
    texts = {id: token.removesuffix("</w>") for token, id in (tokenizer.vocab | tokenizer.added_ids()).items()}
    pieces = {word: [(id, texts[id]) for id in tokenizer.ids(word)] for word in found}
    is_clip = len(tokenizer.vocab) == len(clip_vocabulary()[0])  # of another vocabulary, nobody knows what is frequent
    return [Note(TOPIC, _describe(pieces, len(tokenizer.vocab))), *(_warnings(pieces) if is_clip else [])]


def _describe(pieces: Pieces, size: int) -> str:
    """How the words are tokenized, in one sentence. size: of the vocabulary."""
    shown, parts = " ".join(pieces), [part for word in pieces for part in pieces[word]]
    if len(parts) == 1:
        return f'"{shown}" is one token, number {parts[0][0]:,} of {size:,}; later tokens are rarer.'
    numbered = listed((f"{text} ({id:,})" for id, text in parts), 6)
    return f'"{shown}" is {len(parts)} tokens of the {size:,}: {numbered}.'


def _warnings(pieces: Pieces) -> list[Note]:
    notes = []
    if "sks" in pieces:
        text = '"sks" is also a rifle, which Stable Diffusion knows. If the pictures show one, take another rare word.'
        notes.append(Note(TOPIC, text, warning=True))
    if any(len(parts) == 1 and parts[0][0] >= RARE for parts in pieces.values()):
        return notes  # one rare word is enough
    split = [word for word, parts in pieces.items() if len(parts) > 1]
    frequent = [word for word in pieces if word not in split]
    several = "of several tokens, which the model knows from other words"
    for found, text in [(split, several), (frequent, "frequent, with a meaning already")]:
        if found:
            shown = listed(f'"{word}"' for word in found)
            said = f"{shown} {'is' if len(found) == 1 else 'are'} {text}. Take a rare word that is one token."
            notes.append(Note(TOPIC, said, warning=True))
    return notes


def _of_class_word(prompt: str, class_prompt: str) -> list[Note]:
    """Nothing for a class prompt that names nothing."""
    instance, subject = words(prompt.lower()), [word for word in words(class_prompt.lower()) if word not in FILLERS]
    if not subject:
        return []
    missing = [word for word in subject if word not in instance]
    shown = listed(f'"{word}"' for word in subject)
    if len(missing) == len(subject):
        text = f'"{prompt}" does not name the class, {shown}, so that the model has to learn it too. Add it there.'
        return [Note("prompts", text, warning=True)]
    but = f", but not {listed(missing)}" if missing else ""
    return [Note("prompts", f'"{prompt}" names the class, {shown}{but}.')]
