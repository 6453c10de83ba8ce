"""The server on a CPU against `transformers.generate`: `python -m bench.cpu --json out.json`.

Both have the same random checkpoint of a published shape, the same dtype and the same number of threads, and answer the
same requests, by turns in one run; what counts is the ratio of each pair, since a shared machine is not the same from
one minute to the next. Ours goes the whole way: `lightqwen serve` in its own processes, over gRPC, streaming.

- one: a single request, greedy;
- mixed: 16 requests of mixed lengths, greedy. Ours gets them at once; transformers gets one batch, prompts padded to
  the longest, which runs until the longest output is done;
- sampled: as mixed, with what Qwen3 recommends: temperature 0.6, top-k 20, top-p 0.95;
- nucleus: as mixed, at temperature 1 with top-p 0.95 and no top-k, to which every token of the vocabulary counts.

Tokens per second are the output tokens that were asked for over the time until the last of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.provenance import json_file, provenance
from bench.server import Failed, serving
from bench.workloads import Job, uniform
from lightqwen.client import AsyncClient, Delta
from model.published import SIZES, write_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16")
Tokens = list[list[int]]
Sampling = dict[str, Any]


def mixed_16() -> list[Job]:
    """16 requests, prompts of 16 to 192 tokens, outputs of 16 to 64."""
    rng = random.Random(0)
    return [uniform(1, rng.randint(16, 192), rng.randint(16, 64), seed=i)[0] for i in range(16)]


GREEDY: Sampling = {"temperature": 0.0}
SAMPLED: Sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
NUCLEUS: Sampling = {"temperature": 1.0, "top_k": 0, "top_p": 0.95}
WORKLOADS = {
    "one": (uniform(1, 64, 64), GREEDY),
    "mixed": (mixed_16(), GREEDY),
    "sampled": (mixed_16(), SAMPLED),
    "nucleus": (mixed_16(), NUCLEUS),
}


# ---- ours ------------------------------------------------------------------------------------------------------------


def served(folder: Path, dtype: str, threads: int) -> AbstractContextManager[tuple[dict[str, str], float]]:
    """A running server, as `serving` gives it."""
    options = ["--model", str(folder), "--device", "cpu", "--dtype", dtype, "--port", "0", "--metrics-port", "-1"]
    options += ["--health-port", "-1", "--max-model-len", "1024", "--cpu-kv-gib", "3", "--log-level", "warning"]
    return serving(options, os.environ | {"OMP_NUM_THREADS": str(threads)})


async def _stream(client: AsyncClient, job: Job, sampling: Sampling) -> list[int]:
    tokens: list[int] = []
    options: dict[str, Any] = {"ignore_eos": True, "text": False, "token_ids": True, **sampling}
    generation = client.generate(job.prompt_ids, max_tokens=job.max_tokens, bypass_prefix_cache=True, **options)
    async for event in generation:
        if isinstance(event, Delta):
            tokens += event.token_ids
    return tokens


def run_ours(address: str, jobs: list[Job], sampling: Sampling) -> tuple[float, Tokens]:
    """Seconds from the first call to the last token, and the tokens."""

    async def run() -> tuple[float, Tokens]:
        async with AsyncClient(address) as client:
            await client.channel.channel_ready()
            began = time.perf_counter()
            tokens = await asyncio.gather(*(_stream(client, job, sampling) for job in jobs))
            return time.perf_counter() - began, list(tokens)

    return asyncio.run(run())


# ---- theirs ----------------------------------------------------------------------------------------------------------


def write_checkpoint(size: str, folder: Path) -> None:
    """A bfloat16 checkpoint of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    write_config(size, folder)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).save_pretrained(folder)


def load_theirs(folder: Path, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def run_theirs(model: PreTrainedModel, jobs: list[Job], sampling: Sampling) -> tuple[float, Tokens]:
    """Seconds of one `generate`, and the tokens that were asked for."""
    import torch

    longest = max(len(job.prompt_ids) for job in jobs)
    padding = [longest - len(job.prompt_ids) for job in jobs]
    ids = torch.tensor([[0] * pad + job.prompt_ids for pad, job in zip(padding, jobs, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    options = {"do_sample": False} if sampling is GREEDY else {"do_sample": True, **sampling}
    steps = max(job.max_tokens for job in jobs)
    began = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, **options)  # type: ignore[operator]
    seconds = time.perf_counter() - began
    return seconds, [row[longest : longest + job.max_tokens].tolist() for row, job in zip(out, jobs, strict=True)]


# ---- both ------------------------------------------------------------------------------------------------------------


def measure(folder: Path, dtype: str, threads: int, workloads: Sequence[str], pairs: int) -> dict[str, Any]:
    """Each workload by turns; the order within a pair changes too."""
    results: dict[str, Any] = {}
    model = load_theirs(folder, dtype)
    with served(folder, dtype, threads) as (facts, _):
        for name in workloads:
            jobs, sampling = WORKLOADS[name]
            asked = sum(job.max_tokens for job in jobs)
            short = [Job(job.prompt_ids, 2) for job in jobs]
            run_ours(facts["address"], short, sampling)  # warm-up
            run_theirs(model, short, sampling)
            ours: list[tuple[float, Any]] = []
            theirs: list[tuple[float, Any]] = []
            for pair in range(pairs):
                for mine in (True, False) if pair % 2 == 0 else (False, True):
                    seconds, tokens = (
                        run_ours(facts["address"], jobs, sampling) if mine else run_theirs(model, jobs, sampling)
                    )
                    (ours if mine else theirs).append((asked / seconds, tokens))
                print(f"{dtype} {name} pair {pair}: {ours[-1][0]:.2f} against {theirs[-1][0]:.2f} tokens/s", flush=True)
            ratios = [mine / other for (mine, _), (other, _) in zip(ours, theirs, strict=True)]
            results[name] = {
                "ours_tok_s": [rate for rate, _ in ours],
                "transformers_tok_s": [rate for rate, _ in theirs],
                "ratio_median": statistics.median(ratios),
                "ratios": ratios,
                "same_tokens": _share_of_equal(ours[0][1], theirs[0][1]) if sampling is GREEDY else None,
            }
    return results


def _share_of_equal(ours: Tokens, theirs: Tokens) -> float:
    """How much of the outputs is equal up to the first difference of each: that both do the same work."""
    equal = sum(
        next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
        for mine, other in zip(ours, theirs, strict=True)
    )
    return equal / sum(len(mine) for mine in ours)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.6B", help="a published shape (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="(default: float32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (default: all cores)")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which workloads")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each workload (default: %(default)s)")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the results here too")
    arguments = parser.parse_args()

    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        print(f"bench.cpu: {error.name} is not installed; see the extra test of pyproject.toml", file=sys.stderr)
        return 1

    torch.set_num_threads(arguments.threads)
    report = provenance("bench.cpu") | {"size": arguments.size, "threads": arguments.threads}
    report |= {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_checkpoint(arguments.size, folder)
        try:
            for dtype in arguments.dtype:
                report[dtype] = measure(folder, dtype, arguments.threads, arguments.only, arguments.pairs)
        except Failed as error:
            print(f"bench.cpu: {error}", file=sys.stderr)
            return 1
    print(f"{'dtype':10}{'workload':10}{'ours tok/s':>14}{'transformers':>14}{'ratio':>8}{'same tokens':>13}")
    for dtype in arguments.dtype:
        for name, result in report[dtype].items():
            ours, theirs = (statistics.median(result[key]) for key in ("ours_tok_s", "transformers_tok_s"))
            same = "" if result["same_tokens"] is None else f"{result['same_tokens']:.0%}"
            print(f"{dtype:10}{name:10}{ours:14.2f}{theirs:14.2f}{result['ratio_median']:8.2f}{same:>13}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
