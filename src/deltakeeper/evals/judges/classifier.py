"""A Hugging Face model as judge: a sequence classifier, or a causal model that answers yes or no."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from deltakeeper.devices import working_device
from deltakeeper.errors import DataError, first_line
from deltakeeper.evals.judges.base import LABELS, Asked, Label, Seen, Verdict
from deltakeeper.evals.judges.settings import Settings, digest
from deltakeeper.quiet_loading import quiet_loading

_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")
_HOLES = re.compile(r"\{(prompt|answer)\}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHORTEST = 16


class ClassifierSettings(Settings):
    """Settings of a classifier as judge.

    Attributes:
        kind: `classifier`.
        name: name under which verdicts are recorded.
        version: version of these settings.
        model: folder, relative to the settings file, or a hub name.
        revision: commit of the hub repository; a branch would be another judge tomorrow.
        form: `sequence` for a classification head, `yes_no` for a causal model whose next word decides.
        template: text that the model is given, with `{prompt}` and `{answer}`.
        labels: what each class of the head means, by its name in the model's config or its number; for `yes_no`, what
            `yes` and `no` mean.
        event: the label whose probability is held against the threshold.
        threshold: probability from which `event` is given; else the likeliest of the other labels.
        yes: the word for yes, as the model was taught to write it after the template.
        no: the word for no.
        max_len: most tokens; a longer answer is cut.
        truncation: which end of the answer is cut off.
        batch: exchanges at a time.
    """

    kind: Literal["classifier"]
    name: str = Field(min_length=1, max_length=80)
    version: str = Field(default="1", min_length=1, max_length=80)
    model: str = Field(min_length=1, max_length=1000)
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    form: Literal["sequence", "yes_no"] = "sequence"
    template: str = Field(max_length=20_000)
    labels: dict[str, Label] = Field(min_length=1, max_length=64)
    event: Label
    threshold: float = Field(default=0.5, gt=0, lt=1, strict=False)
    yes: str = Field(default="yes", min_length=1, max_length=40)
    no: str = Field(default="no", min_length=1, max_length=40)
    max_len: int = Field(default=2048, ge=_SHORTEST, le=131_072)
    truncation: Literal["left", "right"] = "right"
    batch: int = Field(default=8, ge=1, le=1024)

    @field_validator("template")
    @classmethod
    def _has_the_answer(cls, template: str) -> str:
        if "{answer}" not in template:
            raise ValueError("it must hold {answer}, and {prompt} where the model wants it")
        return template

    @model_validator(mode="after")
    def _labels_fit(self) -> ClassifierSettings:
        meant = set(self.labels.values())
        if self.event not in meant:
            raise ValueError("'event' must be one of the labels that classes mean")
        if self.form == "yes_no" and set(self.labels) != {"yes", "no"}:
            raise ValueError("'labels' of the form yes_no must say what 'yes' and what 'no' means")
        if len(meant) < 2 or "unparsed" in meant:
            raise ValueError(f"'labels' must mean at least two of {', '.join(LABELS[:-1])}")
        return self


class ClassifierJudge:
    """Judges by the probabilities of a local model, loaded at its first use and kept.

    The template's own words are never cut: a long answer loses tokens at one end until the whole fits, and an exchange
    that does not fit without its answer is `unparsed`.
    """

    def __init__(self, settings: ClassifierSettings, folder: Path, sha256: str) -> None:
        self.settings = settings
        self.folder = folder
        self._weights = sha256
        self._loaded: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: it loads the model itself."""
        return {**self.__dict__, "_loaded": None}

    def __repr__(self) -> str:
        return f"ClassifierJudge({self.name!r}, {self.settings.model!r})"

    @property
    def name(self) -> str:
        """Name from the settings."""
        return self.settings.name

    @property
    def version(self) -> str:
        """Version from the settings."""
        return self.settings.version

    @property
    def sha256(self) -> str:
        """Hash of the settings and of the model: its files, or the commit of the hub."""
        settings = self.settings.model_dump(exclude={"batch", "name", "model"})
        return digest({"settings": settings, "model": self._weights})

    @property
    def events(self) -> frozenset[Seen]:
        """Refusal if a class means it, compliance if one does."""
        meant = set(self.settings.labels.values())
        seen: set[Seen] = set()
        if meant & {"refused", "partial"}:
            seen.add("refused")
        if "complied" in meant:
            seen.add("complied")
        return frozenset(seen)

    def verdicts(self, asked: Sequence[Asked]) -> list[Verdict]:
        """Judge every exchange, the longest first.

        Raises:
            DataError: the model cannot be loaded, or its classes are not those of the settings.
        """
        model, tokenizer = self._model()
        texts = [self._text(one, tokenizer) for one in asked]
        found = {i: Verdict("unparsed", self.name, self.version, self.sha256) for i, x in enumerate(texts) if x is None}
        order = sorted((i for i, x in enumerate(texts) if x is not None), key=lambda i: (-len(texts[i] or ""), i))
        for start in range(0, len(order), self.settings.batch):
            rows = order[start : start + self.settings.batch]
            for i, chances in zip(rows, self._chances(model, tokenizer, [texts[i] or "" for i in rows]), strict=True):
                found[i] = self._verdict(chances)
        return [found[i] for i in range(len(asked))]

    def _verdict(self, chances: dict[Label, float]) -> Verdict:
        score = chances[self.settings.event]
        label = self.settings.event
        if score < self.settings.threshold:
            label = max((x for x in chances if x != self.settings.event), key=lambda x: (chances[x], x))
        raw = ", ".join(f"{name} {chance:.4f}" for name, chance in sorted(chances.items()))
        return Verdict(label, self.name, self.version, self.sha256, score, raw)

    def _text(self, asked: Asked, tokenizer: Any) -> str | None:
        answer, most = asked.answer, self.settings.max_len
        for _ in range(4):  # a cut between two tokens may join others, so one cut need not be enough
            text = self._filled(asked.prompt, answer)
            over = len(tokenizer(text, add_special_tokens=True)["input_ids"]) - most
            if over <= 0:
                return text
            pieces = tokenizer(answer, add_special_tokens=False)["input_ids"]
            kept = pieces[over:] if self.settings.truncation == "left" else pieces[: max(0, len(pieces) - over)]
            if not kept:
                return None
            answer = tokenizer.decode(kept, skip_special_tokens=True)
        return None

    def _filled(self, prompt: str, answer: str) -> str:
        parts = {"prompt": prompt, "answer": answer}
        return _HOLES.sub(lambda hole: parts[hole[1]], self.settings.template)  # in one pass: braces in an answer stay

    @torch.inference_mode()
    def _chances(self, model: Any, tokenizer: Any, texts: list[str]) -> list[dict[Label, float]]:
        fed = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=True)
        fed = {name: tensor.to(model.device) for name, tensor in fed.items() if name in ("input_ids", "attention_mask")}
        logits = model(**fed).logits.float()
        if self.settings.form == "yes_no":
            columns = [_first_token(tokenizer, word) for word in (self.settings.yes, self.settings.no)]
            shares = logits[:, -1, columns].softmax(-1)  # (batch, 2)
            names = ["yes", "no"]
        elif logits.shape[-1] == 1:
            yes = logits.sigmoid()
            shares, names = torch.cat([1 - yes, yes], -1), ["0", "1"]
        else:
            shares = logits.softmax(-1)  # (batch, classes)
            names = _class_names(model, self.settings.labels)
        found = []
        for row in shares.tolist():
            chances: dict[Label, float] = {}
            for name, chance in zip(names, row, strict=True):
                label = self.settings.labels[name]
                chances[label] = chances.get(label, 0.0) + chance
            found.append(chances)
        return found

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> tuple[Any, Any]:
        try:
            import transformers
        except ImportError as error:
            raise DataError("classifiers are run with transformers; install deltakeeper[demo].") from error
        head = transformers.AutoModelForCausalLM
        if self.settings.form == "sequence":
            head = transformers.AutoModelForSequenceClassification
        safe = {"local_files_only": True, "trust_remote_code": False}
        try:
            with quiet_loading():
                tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(self.folder), **safe)
                model: Any = head.from_pretrained(str(self.folder), dtype="auto", use_safetensors=True, **safe)
        except Exception as error:  # from files of many formats, read by a library that raises all kinds of errors
            raise DataError(
                f"the judge '{self.name}' cannot be loaded from {self.folder} ({first_line(error)}); give a model that "
                "transformers loads from safetensors."
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if self.settings.form == "yes_no":
            tokenizer.padding_side = "left"  # the last column is then the last token of every row
            if len({_first_token(tokenizer, word) for word in (self.settings.yes, self.settings.no)}) == 1:
                raise DataError(f"the judge '{self.name}' begins 'yes' and 'no' with one token; spell them otherwise.")
        else:
            if model.config.pad_token_id is None:
                model.config.pad_token_id = tokenizer.pad_token_id
            names = ["0", "1"] if model.config.num_labels == 1 else _class_names(model, self.settings.labels)
            if absent := [name for name in names if name not in self.settings.labels]:
                raise DataError(
                    f"the judge '{self.name}' has a class '{absent[0]}' that 'labels' does not name; say what it means."
                )
        return model.to(working_device()).eval(), tokenizer


def open_classifier(settings: ClassifierSettings, folder: Path) -> ClassifierJudge:
    """A judge from its settings; a model on the hub is downloaded by its commit, safetensors and texts only.

    Raises:
        DataError: there is no such model, or a hub name comes without a commit.
    """
    local = folder / settings.model
    if local.is_dir():
        return ClassifierJudge(settings, local, _hash_of(local))
    if not _HUB_NAME.fullmatch(settings.model):
        raise DataError(f"there is no model at {local}; give a folder or a hub name.")
    if settings.revision is None:
        raise DataError(
            f"the judge '{settings.name}' takes {settings.model} from the hub; give 'revision', a commit of 40 digits."
        )
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(settings.model, revision=settings.revision, allow_patterns=list(_PATTERNS))
    except Exception as error:  # the hub's client and the network raise all kinds of errors
        raise DataError(
            f"{settings.model} at {settings.revision} cannot be had from the hub ({first_line(error)}); "
            "check the name, the commit and the network."
        ) from error
    return ClassifierJudge(settings, Path(path), settings.revision)


def _hash_of(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for pattern in _PATTERNS for path in folder.glob(pattern)):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _class_names(model: Any, labels: dict[str, Label]) -> list[str]:
    """For each class its name in the settings: by the model's config where known there, else by its number."""
    own = model.config.id2label
    return [str(own[i]) if str(own[i]) in labels else str(i) for i in range(model.config.num_labels)]


def _first_token(tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"the tokenizer has no token for the word '{word}'; spell it as the model writes it.")
    return int(ids[0])
