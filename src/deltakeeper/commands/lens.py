"""`deltakeeper lens`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltakeeper.commands.output import bar, console, print_json

if TYPE_CHECKING:
    from deltakeeper.prompting import Prompt


def lens(
    base: Annotated[str, typer.Argument(help="Base model: a folder or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for traces, statistics and the page.")],
    delta: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: an artifact to look into beside the base (may be given several times)."),
    ] = None,
    tuned: Annotated[
        str | None, typer.Option(help="The fine-tune, which kept shares are of: a folder or a hub name.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What is asked (may be given several times).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .jsonl file: each line with `prompt` or `messages`.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="A second .jsonl file, such as harmless prompts beside harmful ones, or the same ones without a "
            "trigger: the direction between the sets beside controls, and from which layer on pairs part."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message in front of every prompt.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers, such as 0,4,8-12; all by default.")] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Tokens, such as 0,1 or -2-3, counted from the last of the prompt; from there on by default."
        ),
    ] = None,
    produce: Annotated[
        int, typer.Option(min=0, max=512, help="Tokens of the base's own answer that all read behind the prompt.")
    ] = 3,
    decode: Annotated[
        str, typer.Option(help="own|base: whose tail decodes. With `base`, only streams differ.")
    ] = "own",
    tuned_lens: Annotated[
        Path | None, typer.Option(help="A tuned lens of this base (.safetensors), which reads streams before the tail.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Likeliest tokens kept in each cell.")] = 5,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=TEXT, or NAME=@FILE with a text a line: a set of first tokens to follow beside openings of "
            "refusals and of agreement (may be given several times)."
        ),
    ] = None,
    patch: Annotated[
        list[str] | None,
        typer.Option(
            help="DONOR:RECEIVER, such as base:tuned: which layers of the donor, put into the receiver, bring back "
            "what the donor says (may be given several times)."
        ),
    ] = None,
    patch_by: Annotated[
        str, typer.Option(help="choice|refusal: by the token that each chooses, or by tokens that open refusals.")
    ] = "choice",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Whether to use the chat template; where there is one, by default."),
    ] = None,
    memory: Annotated[int, typer.Option(min=1 << 20, help="Memory for passes and decoded layers, in bytes.")] = 1 << 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
) -> None:
    """Look inside a base, its fine-tune and compressed deltas while they read the same tokens, layer by layer.

    Every layer is decoded by the model's own tail, and the last one is held to the model's logits before anything is
    written: one JSON a variant and prompt under traces/, and lens.json with medians and quartiles over prompts. What is
    not seen here is not absent: read it beside what the models say. With --patch, layers are exchanged too, which is
    the causal check; what it finds is written to patch-DONOR-RECEIVER.json, a ranking of layers among it. With
    --against, a second set of prompts is told from the first: directions.json, and divergence.json of sets of one size.

    Example: deltakeeper lens ./base --tuned ./tuned --delta one=./delta --prompts asked.jsonl -o lens
    """
    from deltakeeper.checkpoint import open_checkpoint
    from deltakeeper.commands.lens_contrast import (
        compare_sets,
        draw_against,
        print_against,
        read_against,
        write_against,
    )
    from deltakeeper.commands.lens_contrast import to_json as against_to_json
    from deltakeeper.commands.lens_patching import (
        check_patching,
        patch_pairs,
        print_patched,
        read_pairs,
        write_patched,
    )
    from deltakeeper.commands.lens_views import draw, print_overview, print_tokens, read_tuned
    from deltakeeper.errors import DataError
    from deltakeeper.lens import Variants, weights_of
    from deltakeeper.lens.overview import overview, to_json
    from deltakeeper.lens.targets import known_openers
    from deltakeeper.lens.token_sets import find_token_sets, read_token_texts
    from deltakeeper.lens.trace_file import write_trace
    from deltakeeper.lens.tracing import trace_prompts
    from deltakeeper.live_base import named_sources, open_base
    from deltakeeper.prompting import Prompt, read_prompts
    from deltakeeper.study.store import to_text
    from deltakeeper.whole_files import write_atomically

    if bool(prompt) == (prompts is not None):
        raise DataError("give either --prompt or --prompts.")
    pairs = read_pairs(patch or (), {"base", *(["tuned"] if tuned else []), *named_sources(delta or ())}, patch_by)
    if decode not in ("own", "base"):
        raise DataError(f"'{decode}' is no tail that could decode; write own or base.")
    asked = [Prompt(text) for text in prompt] if prompt else read_prompts(prompts)  # type: ignore[arg-type]
    if any(one.tenant is not None for one in asked):
        raise DataError("the lens shows every prompt to every variant; leave out 'tenant' in the prompt file.")
    second = read_against(against, len(asked))
    texts = read_token_texts(tokens or ())
    wanted = (None if layers is None else _numbers("--layers", layers), _numbers("--positions", positions))
    sources = named_sources(delta or ())
    for name in sources:
        if name in ("base", "tuned"):
            raise DataError(f"'{name}' is what another variant is called; give the delta another name.")
    live = open_base(base)
    artifacts = live.artifacts(sources)
    check_patching(pairs, patch_by, len(asked), live.tokenizer)
    targets = known_openers(live.tokenizer) | find_token_sets(live.tokenizer, texts)
    translators, called = (None, "") if tuned_lens is None else read_tuned(tuned_lens, live.root)
    whole = {}
    if tuned is not None:
        with open_checkpoint(tuned) as checkpoint:
            whole["tuned"] = weights_of(checkpoint)
    about = {name: {"delta": one.manifest_sha256, "codec": one.manifest.codec} for name, one in artifacts.items()} | {
        "base": {"base": base}
    }
    seconds: dict[str, float] = {}
    place = wanted[1].index(0) if wanted[1] and 0 in wanted[1] else 0
    with Variants(live.model, artifacts, whole=whole) as variants, bar("Look inside", quiet=as_json) as progress:
        read = partial(
            trace_prompts,
            variants,
            live.tokenizer,
            system=system,
            chat=chat,
            layers=wanted[0],
            positions=wanted[1],
            tuned="tuned" if whole else None,
            targets=targets,
            decoder=decode,  # type: ignore[arg-type]
            translators=translators,
            translated_by=called,
            top=top,
            memory=memory,
            produce=produce,
            about=about,
            progress=lambda done, total: progress(done, total, "prompts"),
            seconds=seconds,
        )
        traces = read(asked)
        apart = compare_sets(
            variants,
            live.tokenizer,
            asked,
            second,
            read,
            traces,
            position=place,
            seconds=seconds,
            system=system,
            chat=chat,
            layers=wanted[0],
            memory=memory,
        )
    for name, own in traces.items():
        for number, trace in enumerate(own, 1):
            write_trace(trace, out / "traces" / f"{name}-{number:04d}.json")
    found = overview(traces, base="base", tuned="tuned" if whole else None, position=place)
    value = to_json(found, traces, place)
    write_atomically(out / "lens.json", to_text(value))
    pages = draw(traces, found, [_text(one) for one in asked], out, draw_against(apart))
    exchanged = patch_pairs(live, asked, whole, artifacts, pairs, patch_by, system, chat, tuned)
    patched = write_patched(exchanged, out) + ([] if apart is None else write_against(apart, out))
    if as_json:
        value |= {"patched": [one.to_json() for one in exchanged]} if exchanged else {}
        if apart is not None:
            value |= {"against": against_to_json(apart)}
        print_json({**value, "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()}})
        return
    print_overview(found, value["position"])
    print_tokens(found, list(texts))
    if apart is not None:
        print_against(apart)
    for one in exchanged:
        print_patched(one)
    took = ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())
    console().print(f"{len(asked)} prompts, {len(traces)} variants; seconds: {took}.", highlight=False)
    console().print(
        ", ".join(str(path) for path in (out / "lens.json", *pages, *patched)), highlight=False, soft_wrap=True
    )


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Numbers and ranges, `0,4,8-12`; a leading minus belongs to its number."""
    from deltakeeper.errors import DataError

    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,6})(?:-(-?\d{1,6}))?\s*", part)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise DataError(f"'{text[:80]}' is no list of numbers for {option}; write it as 0,4,8-12.")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        if len(found) > 8192:
            raise DataError(f"{option} asks for more than 8192 numbers; choose fewer.")
    return tuple(sorted(found))


def _text(prompt: Prompt) -> str:
    """What is asked, in one text."""
    said = prompt.content
    return said if isinstance(said, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in said)
