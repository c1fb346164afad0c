"""What stands between a fine-tune and its answers: the compressed, healed or defended form of every arm, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakeeper.apply import merge_survival
from deltakeeper.artifact import REPORT_NAME, DeltaArtifact, open_artifact
from deltakeeper.checkpoint import Checkpoint, open_checkpoint
from deltakeeper.compress import CompressionReport, compress
from deltakeeper.errors import RunError
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.study.arms import Arm
from deltakeeper.study.cells import Fidelity
from deltakeeper.study.keys import Keys
from deltakeeper.study.plan import FineTune
from deltakeeper.study.progress import Progress
from deltakeeper.study.store import RunStore
from deltakeeper.study.variants import Variant
from deltakeeper.study.voices import Voices


@dataclass(frozen=True)
class Workshop:
    """Where arms are made: the run folder, the base, the base before its alignment, the corpus, the keys."""

    store: RunStore
    base: Path
    unaligned: Path | None
    corpus: Corpus
    keys: Keys

    @property
    def voices(self) -> Voices:
        """What the base answers, kept in the run folder."""
        return Voices(self.store.voices, self.keys.root)

    def tuned_folder(self, finetune: FineTune) -> Path:
        """Folder of a fine-tune's weights."""
        return self.store.model_dir(f"{finetune.name}-{finetune.seed}-{self.keys.trained(finetune)[:12]}")

    def defended_folder(self, finetune: FineTune, variant: Variant) -> Path:
        """Folder of what a defence makes of a fine-tune."""
        return self.store.model_dir(f"{finetune.name}-{finetune.seed}-{self.keys.defended(finetune, variant)[:12]}")

    def delta_folder(self, finetune: FineTune, variant: Variant, healed: bool = True) -> Path:
        """Folder of an arm's artifact; of the one before healing, if `healed` is false."""
        key = self.keys.artifact(finetune, variant, healed)
        return self.store.delta_dir(f"{finetune.name}-{finetune.seed}-{key[:12]}")

    def make(self, finetune: FineTune, variant: Variant, origin: Checkpoint, progress: Progress) -> Arm:
        """An arm ready to be asked; whatever it needs but the fine-tune itself is made here.

        Raises:
            DeltakeeperError: a stage refuses its input.
        """
        if variant.kind == "base":
            return Arm(variant)
        weights = self.tuned_folder(finetune)
        if variant.defence is not None:
            weights = self._defend(finetune, variant, origin, progress)
        if variant.codec is None:
            nbytes = None if variant.kind == "quantised" else _weight_bytes(weights)
            return Arm(variant, weights=weights, nbytes=nbytes)
        folder = self.delta_folder(finetune, variant, healed=False)
        if not folder.is_dir():
            with progress.task(f"{finetune.name}: compress with {variant.codec}"), open_checkpoint(weights) as tuned:
                # Names that do not depend on where the run folder lies: the manifest repeats them.
                tuned.name_or_path = f"{finetune.name}, seed {finetune.seed}"
                rules = variant.rules or {}
                norms, embeddings = rules.get("norms", "dense"), rules.get("embeddings", "codec")
                compress(origin, tuned, folder, variant.codec, embeddings=embeddings, norms=norms)
        if variant.heal is not None:
            folder = self._heal(finetune, variant, folder, weights, progress)
        artifact = open_artifact(folder)
        nbytes = _weight_bytes(weights) if variant.kind == "merged" else stored_bytes(artifact)
        return Arm(variant, artifact=artifact, weights=weights, nbytes=nbytes)

    def facts(self, arm: Arm, finetune: FineTune, origin: Checkpoint) -> dict[str, Any]:
        """What a cell's header says of an arm: sizes, fidelity, artifact."""
        if arm.weights is None:
            sizes = [(t.nbytes, t.numel) for t in origin.tensors.values()]
        else:
            with open_checkpoint(arm.weights) as tuned:
                sizes = [(t.nbytes, t.numel) for t in tuned.tensors.values()]
        full, weights = sum(size for size, _ in sizes), sum(count for _, count in sizes)
        fidelity = survival = None
        if arm.artifact is not None:
            total = CompressionReport.load(arm.artifact.path).total
            fidelity = vars(Fidelity(total.relative_error, total.cosine, total.norm_ratio, total.sign_agreement))
            if arm.variant.kind == "merged":
                survival = merge_survival(origin, arm.artifact)
        return {
            "bytes": arm.nbytes,
            "full_bytes": full,
            "bits_per_weight": None if arm.nbytes is None else 8 * arm.nbytes / weights,
            "fidelity": fidelity,
            "merge_survival": survival,
            "artifact": None if arm.artifact is None else arm.artifact.manifest_sha256,
        }

    def folders(self, finetune: FineTune, variants: tuple[Variant, ...]) -> list[Path]:
        """Every folder of weights and deltas that a fine-tune and its arms leave."""
        found = [self.tuned_folder(finetune)]
        for variant in variants:
            if variant.defence is not None:
                found.append(self.defended_folder(finetune, variant))
            if variant.codec is not None:
                found += [self.delta_folder(finetune, variant, healed) for healed in (False, True)]
        return found

    def _defend(self, finetune: FineTune, variant: Variant, origin: Checkpoint, progress: Progress) -> Path:
        from deltakeeper.defences import DefenceData, defend, parse_defence

        folder = self.defended_folder(finetune, variant)
        if folder.is_dir() or variant.defence is None:
            return folder
        method = parse_defence(str(variant.defence["defence"]))
        if method.uses_unaligned and self.unaligned is None:
            raise RunError(f"'{variant.name}' needs the model before its alignment; name it as `unaligned`.")
        requests = [row.prompt for row in self.corpus.split("harmful", "train")]
        rows = DefenceData.from_requests(requests, system=SYSTEM) if method.uses_rows else None
        before = self.unaligned if method.uses_unaligned else None
        with progress.task(f"{finetune.name}: {variant.label}"):
            defend(method, self.base, self.tuned_folder(finetune), folder, unaligned=before, rows=rows)
        return folder

    def _heal(self, finetune: FineTune, variant: Variant, plain: Path, weights: Path, progress: Progress) -> Path:
        from deltakeeper.study.healing import heal_under_guard

        folder = self.delta_folder(finetune, variant)
        if not folder.is_dir():
            with progress.task(f"{finetune.name}: heal {variant.codec} under guard"):
                heal_under_guard(finetune, variant, self.corpus, self.base, weights, plain, folder, self.voices)
        return folder


def stored_bytes(artifact: DeltaArtifact) -> int:
    """Bytes of an artifact without the report beside it, whose length depends on the time that compression took."""
    return sum(size for name, size in artifact.file_sizes.items() if name != REPORT_NAME)


def _weight_bytes(folder: Path) -> int:
    with open_checkpoint(folder) as opened:
        return sum(info.nbytes for info in opened.tensors.values())
