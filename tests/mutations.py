"""Do the tests see it? Each mutation makes one mistake in a copy of the package; the tests have to fail on the copy.

    python tests/mutations.py                        # all of them, 25 minutes on 2 cores
    python tests/mutations.py core/route core/experts  # those of files whose path has this in it
    python tests/mutations.py --jobs 1 --verbose
    python tests/mutations.py --invariant            # ten of them, against tests/invariant alone

Run by hand. One that no test fails on has survived: a test is missing. It exits with 1 if more than one in 25 survives,
or if one does not apply, as the text that it replaces is not there exactly once.

To add one, add a line to the list of its file in `MUTATIONS`: the old text, the new one, and what goes wrong. A new
file needs the tests that hold it in `TESTS`; together they should take less than a minute.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("peft_bsr", "tests", "benchmarks", "docs", "pyproject.toml")
IGNORED = shutil.ignore_patterns("__pycache__", "results")
ALLOWED = 1 / 25  # share that may survive


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        file: Path below `peft_bsr`.
        old: Text that is there exactly once.
        new: What takes its place.
        why: What goes wrong then.
    """

    file: str
    old: str
    new: str
    why: str

    @property
    def problem(self) -> str | None:
        """Why it does not apply, or None."""
        path = ROOT / "peft_bsr" / self.file
        if not path.exists():
            return "there is no such file"
        count = path.read_text().count(self.old)
        return None if count == 1 else f"the text {self.old!r} is there {count} times, not once"


# file below peft_bsr -> what pytest is told to run, the fastest first
TESTS: dict[str, list[str]] = {
    "core/reduction.py": ["tests/core", "tests/engine/test_exactness.py"],
    "core/merging.py": ["tests/core/test_merging.py"],
    "core/route.py": ["tests/core", "tests/engine/test_exactness.py"],
    "core/attention.py": ["tests/core", "tests/engine/test_exactness.py"],
    "core/budgets.py": ["tests/core"],
    "core/queries.py": ["tests/core", "tests/engine/test_query_path.py"],
    "core/experts.py": ["tests/core", "tests/multitask/test_mixture.py"],
    "core/grouped.py": ["tests/core", "tests/multitask/test_mixture.py"],
    **{
        f"ops/{name}.py": ["tests/engine/test_lean.py", "tests/engine/test_living.py"]
        for name in ("linear", "norm", "activation", "half", "mlp", "projections", "recompute", "dropout")
    },
    "ops/reduce.py": ["tests/core", "tests/engine/test_exactness.py", "tests/engine/test_gradients.py"],
    "ops/int8.py": ["tests/engine/test_int8.py"],
    "engine/int8.py": ["tests/engine/test_int8.py", "tests/engine/test_living.py"],
    "engine/bound.py": [
        "tests/engine/test_hooks.py",
        "tests/engine/test_lean.py",
        "tests/engine/test_hooks_everywhere.py",
    ],
    "engine/watch.py": ["tests/engine/test_hooks.py"],
    "engine/traced.py": ["tests/engine/test_compiled_lean.py"],
    **{
        f"training/{name}.py": ["tests/training/test_cache_faults.py", "tests/training/test_feature_cache.py"]
        for name in ("cache_files", "cache_samples", "feature_cache", "random_draws", "cache_point")
    },
    "compat/torch_api.py": ["tests/compat/test_torch_api.py", "tests/engine/test_hook_table.py"],
    "selftest/reduction.py": ["tests/engine/test_hook_table.py"],
}

# file below peft_bsr -> (old text, new text, what goes wrong)
MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "training/cache_files.py": [
        ("os.posix_fallocate(file.fileno(), 0, size)", "pass", "a full disk is met in the middle"),
        (
            "if self._checksum(index, rows) != int(rows.pop(_CHECKSUMS)[0]):",
            "if not rows.pop(_CHECKSUMS).size:",
            "damage",
        ),
        ('zlib.crc32(index.to_bytes(8, "little"), self._seed)', "self._seed", "rows that changed places are taken"),
        ("if not 0 <= self.num_done <= self.num_rows:", "if False:", "counts that cannot be are taken"),
        (
            "        _remove_unfinished(draft)\n        if taken",
            "        if taken",
            "what a killed build left is in the way",
        ),
        ("if path.exists()]:", "if False]:", "other files are overwritten"),
        ("                lock.acquire()\n        try:", "                pass\n        try:", "two builders at once"),
        ("        if found != own:", "        if False:", "samples of another kind are cut into rows"),
        ("self._seed = zlib.crc32(text)", "self._seed = 0", "another cache.json is taken"),
    ],
    "training/cache_samples.py": [
        ("for _ in range(_TIMES)", "for _ in range(1)", "augmentation is not found"),
        (
            "for name, tensor in tensors:",
            "for name, tensor in [t for t in tensors if t[0] == self.name]:",
            "labels are not told",
        ),
    ],
    "training/feature_cache.py": [
        (
            "_TOKENS: resume_point.tokens.to(dtype),",
            "_TOKENS: resume_point.tokens.flip(0).to(dtype),",
            "images trade places",
        ),
        ("if files.is_complete():", "if False:", "a read-only cache is written"),
        (
            "range(len(done)) if check_all else",
            "samples.spread(_SOME // 8, len(done)) or",
            "one other label is not seen",
        ),
    ],
    "training/random_draws.py": [
        ("in_mode(True, model)", "in_mode(False, model)", "what training draws is not seen"),
        ("    if torch.equal(first, second):\n", "    if False:\n", "draws after the cut count"),
    ],
    "training/cache_point.py": [("            **model,\n", "", "a model that computes otherwise reads the cache")],
    "compat/torch_api.py": [
        ("copy.deepcopy(base, {id(own): own for own in hooks})", "copy.deepcopy(base)", "hooks are copied"),
        ("part._is_full_backward_hook = True", "pass", "a backward hook that comes later does not fire"),
    ],
    "selftest/reduction.py": [
        ("without_hooks(modules),", "without_hooks([]),", "a hook at the start turns lean off for good"),
    ],
    "engine/traced.py": [
        ("= checkpoint(run, tokens, **settings)", "= run(tokens)", "a compiler keeps everything"),
        ("return not obstacle", "return True", "a hook sees a half that runs in a region"),
        ("change[:, :num_queries]", "change[:, 1 : num_queries + 1]", "another token takes the class token's place"),
        (
            "is_kept = any(part in name for part in _ATTENTION)",
            "is_kept = True",
            "nothing but products is computed again",
        ),
        ("if budget >= 1:", "if budget <= 1:", "nothing is said of wrong gradients"),
    ],
    "core/reduction.py": [
        ("math.ceil(", "math.floor(", "one token less survives"),
        ("round(keep_rate * int(num_tokens), 6)", "keep_rate * int(num_tokens)", "0.55 of 100 tokens is 56"),
        ("topk(keep, dim=1)", "topk(keep, dim=1, largest=False)", "the worst tokens decide"),
        ("cumsum(dim=1) <= keep", "cumsum(dim=1) < keep", "a tie is dropped although there is room"),
        (
            "torch.where(is_kept, places, places + num_tokens)",
            "torch.where(~is_kept, places, places + num_tokens)",
            "kept and dropped trade places",
        ),
        ("if keep == origins.shape[1]:", "if False:", "with all kept, a fused token of nothing is appended"),
        (
            "scores[:, num_prefix : num_prefix + origins.shape[1]]",
            "scores[:, : origins.shape[1]]",
            "special tokens compete",
        ),
        ("kept + num_prefix]", "kept]", "kept tokens are off by the prefix"),
        ("competing.gather(1, dropped)", "competing.detach().gather(1, dropped)", "no gradient through the weights"),
        ("dropped).to(", "dropped).softmax(dim=1).to(", "weights of the fused token are normalised"),
        ("dropped + num_prefix)", "dropped)", "the fused token is made of others"),
        ("origins.gather(1, kept)", "origins[:, :keep]", "a token's origin is another's"),
        ("hidden_states[:, -num_suffix:]", "hidden_states[:, :num_suffix]", "detection tokens are the first ones"),
        (
            "hidden_states.reshape(-1, width).index_select(0, rows.reshape(-1)).view(images, -1, width)",
            "hidden_states.gather(1, (rows % num_tokens)[..., None].expand(-1, -1, width))",
            "the whole input is kept for backward",
        ),
        ("hidden_states.scatter(1", "hidden_states.scatter_(1", "full view writes into what others read"),
    ],
    "core/merging.py": [
        ("normalize(tokens[:, 1::2], dim=2)", "tokens[:, 1::2]", "large tokens are everybody's partner"),
        ("2 * partner.gather(1, chosen) + 1", "2 * partner.gather(1, chosen)", "tokens merge with even places"),
        ("held.to(dtype) / total", "1.0 / total", "sizes do not count"),
        ("moved.gather(1, merged)", "moved", "patches of a token that merges again are lost"),
    ],
    "core/route.py": [
        ("return self.num_patches + self.num_reductions", "return self.num_patches", "fused tokens are one"),
        ("self.num_reductions + 1,", "self.num_reductions,", "reductions do not count"),
        ("True)[:, : self.num_patches]", "True)", "fused tokens are alive patches"),
        ("origins, origins + self.num_suffix)", "origins, origins)", "fused tokens have the suffix's places"),
        ("self.num_prefix + fused, suffix]", "fused, suffix]", "patches have the places of special tokens"),
        ("unrotated=1.0)", "unrotated=0.0)", "a fused token's cosine is 0"),
        ("if value.ndim == 2 and shape[-1]", "if value.ndim == 1 and shape[-1]", "padding masks stay long"),
        (
            "if value.ndim >= 3 and shape[-1] == length",
            "if value.ndim > 3 and shape[-1] == length",
            "biases of three axes stay long",
        ),
        ("shape[-2] in (length, self.num_patches)", "shape[-2] == length", "tables without special tokens stay long"),
        (
            "places < self.full_length, places, 0)",
            "places < self.full_length, places, 1)",
            "a fused token is masked as a patch is",
        ),
        (
            "visible = 0.0 if mask.is_floating_point() else 1",
            "visible = 1.0 if mask.is_floating_point() else 0",
            "fused tokens are hidden, or have a bias",
        ),
        (
            "mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))",
            "mask[:, :, : places.shape[1]]",
            "rows of a bias are other tokens'",
        ),
        (
            "self.origins if table.shape[-2] == self.num_patches else self.places()",
            "self.places()",
            "tables of patches are read at places of the sequence",
        ),
        ("padded[rows][:, None]", "padded[rows]", "a table has no axis of heads"),
        ("value=unrotated)", "value=0.5)", "a fused token is rotated"),
    ],
    "core/attention.py": [
        (
            'query[:, :, :1] if kind == "class"',
            'query[:, :, 1:2] if kind == "class"',
            "a patch's attention is the score",
        ),
        ("[:, :, None] * scaling", "[:, :, None]", "logits of the class token are not scaled"),
        ("key.transpose(2, 3) * scaling", "key.transpose(2, 3)", "logits of all tokens are not scaled"),
        ("masked_fill(~mask", "masked_fill(mask", "what is visible is hidden"),
        ("logits = logits + mask", "logits = logits - mask", "biases have the wrong sign"),
        ("torch.promote_types(query.dtype, torch.float32)", "query.dtype", "softmax runs in bf16"),
        (
            "    if mask is None:\n        return values.mean",
            "    if True:\n        return values.mean",
            "padding is in the mean",
        ),
        ("row_mask).squeeze(2).mean(dim=1)", "row_mask).squeeze(2)[:, 0]", "one head decides"),
        ("attention_mask).squeeze(2).mean(dim=1)", "attention_mask).squeeze(2)[:, 0]", "one head decides (received)"),
        (
            '(weights[:, :, 0] if kind == "class"',
            '(weights[..., 0] if kind == "class"',
            "who looks at the class token is the score",
        ),
        ("attention_mask[:, :, :1]", "attention_mask[:, :, -1:]", "the mask is another token's"),
        ("    if query.shape[2] == 1:", "    if False:", "a copy of the key is kept for backward"),
        ("weight.sum(dim=2, keepdim=True).clamp_min(1)", "weight.shape[2]", "hidden tokens count in the mean"),
    ],
    "core/budgets.py": [
        ('if reduction == "relative":', 'if reduction == "mean":', "relative and mean trade places"),
        ("before.square().sum(dim=1).clamp_min", "before.square().sum().clamp_min", "relative to the whole batch"),
        ("(after - before).square().sum(dim=1)", "(after - before).abs().sum(dim=1)", "not the squared distance"),
        ('total if reduction == "paper"', 'total if reduction == "mean"', "sum and mean trade places"),
        ("alpha * (n - o)", "alpha * (o - n)", "budgets move the other way"),
        ("min(max(b + alpha * (n - o), low), high)", "max(b + alpha * (n - o), low)", "budgets have no upper bound"),
        ("max(b + alpha * (n - o), low)", "b + alpha * (n - o)", "budgets have no lower bound"),
        ("math.exp(budget)", "1.0", "all blocks are drawn alike"),
        ("sorted(times)[:count]", "sorted(times)[-count:]", "small budgets are drawn"),
        ("(budgets[index], index))[depth - count :]", "(budgets[index], index))[:count]", "the smallest budgets train"),
        ("(budgets[index], index))", "(budgets[index], -index))", "of equal budgets the earlier trains"),
        ("list(range(depth - count, depth))", "list(range(count))", "the first blocks train"),
    ],
    "core/queries.py": [
        (
            "absorbed.unflatten(1, (batch, num_queries)).permute(1, 2, 0, 3)",
            "absorbed.unflatten(1, (batch, num_queries)).permute(1, 0, 2, 3)",
            "queries and heads trade places",
        ),
        ("tokens.transpose(1, 2)) * scaling", "tokens.transpose(1, 2))", "logits are not scaled"),
        ("hidden[:, None], -torch.inf)", "~hidden[:, None], -torch.inf)", "padding is read, the rest is not"),
        ("torch.promote_types(query.dtype, torch.float32)", "query.dtype", "softmax runs in bf16"),
        ("joined if value_bias is None else joined + value_bias", "joined", "the bias of the values is lost"),
        (
            "values.unflatten(1, (batch, num_queries)).permute(1, 2, 0, 3)",
            "values.unflatten(1, (num_queries, batch)).permute(2, 1, 0, 3)",
            "images and queries trade places",
        ),
        ("hidden.repeat_interleave(num_heads, dim=0)", "hidden.repeat(num_heads, 1)", "padding is another image's"),
        ("row <= torch.finfo(row.dtype).min / 2", "row < 0", "a finite bias hides"),
        ("~row.bool()", "row.bool()", "what is visible is hidden"),
        (
            "mask if mask.ndim == 2 else mask[:, 0, 0]",
            "mask if mask.ndim == 2 else mask[:, 0, -1]",
            "padding is what the last token does not see",
        ),
    ],
    "core/grouped.py": [
        ("[0] - 1, seen", "[0], seen", "rows begin at the second place of a group"),
        ("starts[chosen] + ranks", "starts[chosen.flip(0)] + ranks", "tokens are in other experts' groups"),
        (
            "and (_BLOCKS + 1) * top_k < _BLOCKS * num_experts:",
            "and True:",
            "more blocks than all experts on all tokens",
        ),
        ("(counts + size - 1) // size", "counts // size", "an expert's last block is the next one's"),
        ("(blocks >= ends)", "(blocks > ends)", "the first block of an expert has the weights of the one before"),
        ("if len(part)]", "]", "an expert without tokens runs"),
        ("apply(in_dtype(inputs, dtype)", "apply(inputs", "autocast does not reach the products"),
        ("ctx.save_for_backward(inputs, weight", "ctx.save_for_backward(inputs, weight * 1", "weights are kept twice"),
        (
            "gradient.sum(dim=1, dtype=ctx.bias_dtype)",
            "gradient.mean(dim=1, dtype=ctx.bias_dtype)",
            "biases' gradients",
        ),
    ],
    "core/experts.py": [
        (
            "scatter_add(0, chosen, torch.ones_like(chosen))",
            "scatter_add(0, chosen, chosen)",
            "tokens of an expert are not counted",
        ),
        ("    if renormalize:", "    if not renormalize:", "weights are normalised if they should not be"),
        ("torch.promote_types(logits.dtype, torch.float32)", "logits.dtype", "softmax runs in bf16"),
        ("linear(tokens, gates[tasks])", "linear(tokens, gates[0])", "every task has the first one's gate"),
        (
            "torch.bmm(tokens, gates[tasks].transpose(1, 2))",
            "torch.bmm(tokens, gates[tasks.flip(0)].transpose(1, 2))",
            "images have each other's gates",
        ),
        ("choice.weights.to(outputs.dtype)", "choice.weights.detach().to(outputs.dtype)", "no gradient to the gate"),
        ("_squared_variation(importance) +", "_squared_variation(importance.detach()) +", "balance has no gradient"),
        (" + _squared_variation(choice.counts().to(importance.dtype))", "", "load does not count"),
        ("correction=min(1, len(values) - 1)", "correction=0", "variance of another kind"),
        ("values.mean().square()", "values.mean()", "not relative to the mean"),
    ],
    "ops/linear.py": [
        (
            "in_dtype(gradient, self.lora_B.dtype) @ self.lora_B * self.scaling",
            "in_dtype(gradient, self.lora_B.dtype) @ self.lora_B",
            "the scaling is lost",
        ),
        ("bias = own.sum(dim=0)", "bias = own.mean(dim=0)", "a bias learns too little"),
        ("onto.addmm(gradient, weight)", "gradient @ weight", "the other projections' gradients are lost"),
        ("(seen @ self.lora_A.T) * self.scaling", "(seen @ self.lora_A.T)", "the scaling is lost in the gradient of B"),
    ],
    "ops/norm.py": [
        (
            "scaled - unit * (scaled * unit).mean(dim=-1, keepdim=True)",
            "scaled",
            "the root mean square counts as a constant",
        ),
        (".mean(dim=-1, keepdim=True) + self.eps)", ".mean(dim=-1, keepdim=True))", "eps is forgotten"),
    ],
    "ops/activation.py": [
        ("gradient * self.forward(gate)]", "gradient * gate]", "the gate's activation is left out of the gradient"),
        ("1.702 * inputs)", "inputs)", "QuickGELU has SiLU's derivative"),
        (
            'approximate="tanh" if tanh else "none"',
            'approximate="none"',
            "the tanh GELU has the other one's derivative",
        ),
    ],
    "ops/mlp.py": [
        ("gradient if mask is None else gradient * mask", "gradient", "gradients cross what was dropped"),
        ("len(products) if save_products else 0", "len(products)", "max keeps the products"),
        ("hidden = hidden * mask\n", "pass\n", "the last Linear learns from hidden states that were dropped"),
        (
            "ctx.save_for_backward(tokens,",
            "ctx.kept = normalized, hidden\n        ctx.save_for_backward(tokens,",
            "ctx keeps what is restored",
        ),
    ],
    "ops/projections.py": [
        (
            "[:, :num_queries] += query_grad",
            "[:, :num_queries] = query_grad",
            "keys' gradients of special tokens are lost",
        ),
        (
            "tokens_grad, other_grads = linears_grads(linears[1:]",
            "tokens_grad, other_grads = linears_grads(linears[:0:-1]",
            "key and value trade places",
        ),
    ],
    "ops/recompute.py": [
        ("generator_state(tokens.device) if is_random else None", "None", "backward drops other numbers"),
        (
            "ctx.save_for_backward(tokens, *parameters)",
            "ctx.kept = run(tokens, *parameters)\n        ctx.save_for_backward(tokens, *parameters)",
            "ctx keeps the outputs",
        ),
    ],
    "ops/dropout.py": [
        (
            "with generator_at(ctx.state, gradient.device):",
            "with generator_at(None, gradient.device):",
            "backward drops other numbers",
        ),
        (
            "_generator(device).set_rng_state(present,",
            "_generator(device).set_rng_state(state,",
            "the run goes on with old random numbers",
        ),
    ],
    "ops/reduce.py": [
        ("descending=True, stable=True", "descending=False, stable=True", "the worst tokens stay"),
        ("order[:, :keep].sort(dim=1).values", "order[:, :keep]", "tokens are out of order"),
        (
            "weights.transpose(1, 2) * fused_grad",
            "weights.transpose(1, 2) * 0 * fused_grad",
            "dropped tokens get no gradient",
        ),
        ("saved = (*saved, dropped, picked)", "pass", "scores get no gradient"),
        (
            "shared, weights, -1, weights.dtype",
            "shared * 2, weights, -1, weights.dtype",
            "the scores' gradient is doubled",
        ),
    ],
    "ops/int8.py": [
        (
            "torch.addcdiv(torch.rand_like(above), above, step)",
            "torch.addcdiv(torch.zeros_like(above), above, step)",
            "numbers are rounded down",
        ),
        (
            "torch.addcdiv(torch.rand_like(above), above, step)",
            "torch.addcdiv(torch.full_like(above, 0.5), above, step)",
            "rounding is no more without bias",
        ),
        (
            "torch.sub(low, low.abs(), alpha=_BF16_ROUNDING, out=torch.empty_like(step))",
            "low.bfloat16()",
            "the smallest number lies below the grid",
        ),
    ],
    "engine/int8.py": [
        (
            "return memo[place], dense.shape, dense.stride()",
            "memo[id(tensor)] = tensor\n        return memo[place], dense.shape, dense.stride()",
            "the numbers are kept next to their codes",
        ),
        ("not _is_split_by_heads(tensor)", "True", "queries of as many tokens as a head is wide stay whole"),
    ],
    "engine/bound.py": [
        ("or (self.reader and f", "or (None and f", "a hook inside of a lean half never runs"),
        ('captured_outputs() - {"hidden_states"}', "False", "captured attention weights are missing"),
    ],
    "engine/watch.py": [
        ("sum(map(len, self._dictionaries)) == self._count", "True", "a hook that comes later is not seen"),
        (
            "[*map(dict.get, self._parents, self._names)] == self._children",
            "True",
            "a module that was replaced is not seen",
        ),
        (
            "[*map(itemgetter(STATE), self._holders)] == self._states",
            "True",
            "an adapter that was switched is not seen",
        ),
    ],
}

# what tests/invariant has to see by itself: file, what goes wrong
INVARIANT = [
    ("ops/linear.py", "the scaling is lost"),
    ("ops/linear.py", "a bias learns too little"),
    ("ops/linear.py", "the other projections' gradients are lost"),
    ("ops/projections.py", "keys' gradients of special tokens are lost"),
    ("ops/projections.py", "key and value trade places"),
    ("ops/reduce.py", "dropped tokens get no gradient"),
    ("ops/reduce.py", "the scores' gradient is doubled"),
    ("ops/reduce.py", "the worst tokens stay"),
    ("ops/int8.py", "numbers are rounded down"),
    ("training/feature_cache.py", "images trade places"),
]


def mutations(parts: list[str]) -> list[Mutation]:
    """Those of files whose path has one of `parts` in it; all, if there are none."""
    files = [file for file in MUTATIONS if not parts or any(part in file for part in parts)]
    return [Mutation(file, *texts) for file in files for texts in MUTATIONS[file]]


def run(source: Path, tests: Sequence[str], mutation: Mutation | None = None) -> tuple[bool, str]:
    """Whether a test fails on a copy of `source`, and what pytest says."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        if mutation is not None:
            path = Path(folder) / "peft_bsr" / mutation.file
            path.write_text(path.read_text().replace(mutation.old, mutation.new))
        # bytecode is known by time and size of its source, which a mutation may leave as they are
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1, "; ".join(re.findall(r"^(?:FAILED|ERROR) .*|^\d+ passed.*", done.stdout, re.MULTILINE))


def main() -> None:
    """Run the mutations and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="only files whose path below peft_bsr has one of these in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default 2)")
    parser.add_argument("--verbose", action="store_true", help="also which test fails")
    parser.add_argument("--invariant", action="store_true", help="ten mutations, against tests/invariant alone")
    args = parser.parse_args()
    chosen = mutations(args.parts)
    tests = TESTS
    if args.invariant:
        chosen = [mutation for mutation in chosen if (mutation.file, mutation.why) in INVARIANT]
        tests = {file: ["tests/invariant"] for file in TESTS}
    if not chosen:
        parser.error(f"no file of {list(MUTATIONS)} has any of {args.parts} in its path")
    stale = [f"{m.file}: {m.problem}" for m in chosen if m.problem]
    if stale:
        sys.exit("These mutations do not apply; bring them up to date:\n" + "\n".join(stale))
    survived = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        source = Path(folder)  # what is edited meanwhile does not count
        for name in COPIED:
            copy = shutil.copy if (ROOT / name).is_file() else partial(shutil.copytree, ignore=IGNORED)
            copy(ROOT / name, source / name)
        suites = list({tuple(tests[mutation.file]): None for mutation in chosen})
        for suite, (fails, found) in zip(suites, pool.map(lambda suite: run(source, suite), suites), strict=True):
            if fails:
                sys.exit(f"{', '.join(suite)} fail without a mutation: {found}")
        results = pool.map(lambda mutation: run(source, tests[mutation.file], mutation), chosen)
        for mutation, (is_caught, found) in zip(chosen, results, strict=True):
            verdict = "caught  " if is_caught else "SURVIVED"
            print(f"{verdict} {mutation.file}: {mutation.why}" + (f"  [{found}]" if args.verbose else ""), flush=True)
            if not is_caught:
                survived.append(mutation)
    print(f"\n{len(survived)} of {len(chosen)} survived.")
    sys.exit(len(survived) > ALLOWED * len(chosen))


if __name__ == "__main__":
    main()
